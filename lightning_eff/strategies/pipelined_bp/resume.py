"""How a pipeline goes on from a checkpoint: with the weight versions later passes are to see, or with delays anew."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_eff.errors import EffWarning
from lightning_eff.methods import METHODS
from lightning_eff.methods.state import damaged
from lightning_eff.strategies.pipelined_bp import compatibility as refusals
from lightning_eff.strategies.pipelined_bp.weights import Stage, Weights


def go_on(weights: Weights, loaded: dict[str, Any], starts: list[str], in_flight: int) -> None:
    """Take over what a checkpoint of the same stages remembers; warn of one with others.

    Args:
        weights: of this run, just begun.
        loaded: the checkpoint's state, which has been read (``MethodInfo.read_state``).
        starts: names of the layers this run's stages begin with.
        in_flight: of this run.

    Raises:
        CheckpointError: versions of weights are missing, or have other shapes; nothing is taken over.
    """
    before = [loaded["layers"][i] for i in loaded["starts"]]
    if before != starts or loaded["in_flight"] != in_flight:
        refusals.warn_of_other_stages(before, loaded["in_flight"], starts, in_flight)
        return
    parts = {part["stage"]: part for part in loaded["stages"]}
    for stage in weights.stages:
        if wrong := _wrong(stage, parts[stage.index], loaded["samples"]):
            info = METHODS["pipelined_bp"]
            raise damaged(info.name, f"stage {stage.index} {wrong}.", remove=info.remove_state)
    forgotten = [s.index for s in weights.stages if _needs_previous(s, weights) and parts[s.index]["previous"] is None]
    if loaded["samples"] and forgotten:
        warnings.warn(
            f"pipelined_bp: the checkpoint lacks the last weights but one of the stages {forgotten}, which "
            f"mitigation={str(weights.mitigation)!r} predicts from (it was made with another mitigation?). Their "
            "prediction begins with the next update: the resume is not exact.",
            EffWarning,
            stacklevel=2,
        )
    weights.load(loaded["samples"], loaded["stages"])


def _needs_previous(stage: Stage, weights: Weights) -> bool:
    return "lwp_w" in weights.mitigation.parts and stage.delay > 0


def _wrong(stage: Stage, part: dict[str, Any], samples: int) -> str:
    """What is wrong with the part of a stage, or nothing."""
    present = {int(version) for version in part["versions"]}
    if missing := [v for v in range(max(0, samples - stage.delay), samples) if v not in present]:
        return f"lacks the versions {missing} of its weights, which forward passes to come are to see"
    kept = {f"version {version}": tensors for version, tensors in part["versions"].items()}
    for name, tensors in {**kept, "previous": part["previous"] or stage.parameters}.items():
        if _shapes(tensors) != _shapes(stage.parameters):
            return f"has weights of other shapes in {name}: {_shapes(tensors)} for {_shapes(stage.parameters)}"
    return ""


def _shapes(tensors: Sequence[Tensor | nn.Parameter]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors]
