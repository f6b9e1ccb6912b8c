"""How a pipeline goes on from a checkpoint: with the weight versions later passes are to see, or with delays anew."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_eff.errors import EffWarning
from lightning_eff.methods import METHODS
from lightning_eff.methods.state import damaged
from lightning_eff.strategies.pipelined_bp import compatibility
from lightning_eff.strategies.pipelined_bp.weights import Stage, Weights


def saved_starts(saved: Mapping[str, Any], layers: Sequence[str], stages: object) -> list[int] | None:
    """Return where the checkpoint's stages begin, if this run has as many of the same layers: measured times differ.

    Args:
        saved: the checkpoint's state.
        layers: names of this run's layers.
        stages: how many this run is to have.
    """
    is_same = saved["layers"] == list(layers) and len(saved["starts"]) == stages
    return list(saved["starts"]) if is_same else None


def restore_weights(weights: Weights, saved: Mapping[str, Any], *, starts: Sequence[str], in_flight: int) -> None:
    """Take over the versions of weights in a checkpoint of the same stages; warn of one with others.

    Args:
        weights: of this run, just begun.
        saved: the checkpoint's state, which has been read (``MethodInfo.read_state``).
        starts: names of the layers this run's stages begin with.
        in_flight: of this run.

    Raises:
        CheckpointError: versions of weights are missing, or have other shapes; nothing is taken over.
    """
    before = [saved["layers"][i] for i in saved["starts"]]
    if before != list(starts) or saved["in_flight"] != in_flight:
        compatibility.warn_of_other_stages(
            saved_starts=before, saved_in_flight=saved["in_flight"], starts=starts, in_flight=in_flight
        )
        return
    parts = {part["stage"]: part for part in saved["stages"]}
    for stage in weights.stages:
        if wrong := _wrong(stage, parts[stage.index], saved["samples"]):
            info = METHODS["pipelined_bp"]
            raise damaged(info.name, f"stage {stage.index} {wrong}.", remove=info.remove_state)
    forgotten = [s.index for s in weights.stages if _needs_previous(s, weights) and parts[s.index]["previous"] is None]
    if saved["samples"] and forgotten:
        warnings.warn(
            f"pipelined_bp: the checkpoint lacks the last weights but one of the stages {forgotten}, which "
            f"mitigation={str(weights.mitigation)!r} predicts from (it was made with another mitigation?). Their "
            "prediction begins with the next update: the resume is not exact.",
            EffWarning,
            stacklevel=2,
        )
    weights.load(saved["samples"], saved["stages"])


def _needs_previous(stage: Stage, weights: Weights) -> bool:
    """Return whether a stage's prediction needs the weights before the last update."""
    return "lwp_w" in weights.mitigation.parts and stage.delay > 0


def _wrong(stage: Stage, part: dict[str, Any], samples: int) -> str:
    """Return what is wrong with the part of a stage, or nothing."""
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
