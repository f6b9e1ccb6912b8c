"""What a layer carries from step to step: for each role of a tensor, an estimate made from the steps before.

Methods that predict a scale (delayed FP8, Autoflex, in-hindsight LUQ, fitted formats) all work alike. Within a step
every tensor is encoded with the estimate of the steps before it, and observed. After the optimizer step the
observations, the largest over micro-batches and ranks, update the estimate. So accumulation and recomputation change
nothing, replicas stay equal, and a checkpoint between two steps holds all there is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eff.errors import EffWarning
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.runtime.ranks import world_size


class Estimate(Protocol):
    """A prediction from the past; plain numbers."""

    def update(self, *observed: float) -> object:
        """Take in what one optimizer step has shown; not finite where the step was broken."""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""


def keys_of_variants(info: MethodInfo) -> set[str]:
    """The state keys of the methods that share a class: a run may go on with another variant."""
    return {key for row in METHODS.values() if row.class_name == info.class_name for key in row.state_keys}


def warn_of_other_layers(method: str, memory: Mapping[str, Any], remembering: Collection[str]) -> None:
    """Warn of a checkpoint that does not remember the same layers as this run: their estimates begin anew.

    Args:
        method: whose checkpoint it is.
        memory: what it remembers, by layer.
        remembering: the layers of this run that do; none if the model is not converted yet, or does without.
    """
    forgotten = sorted(set(remembering) - set(memory))
    gone = sorted(set(memory) - set(remembering))
    if forgotten:
        other = f" It remembers others, which are left out: {', '.join(gone[:8])}." if gone else ""
        warnings.warn(
            f"{method}: the checkpoint remembers nothing of {len(forgotten)} layers: {', '.join(forgotten[:8])}.{other}"
            " Their predictions begin anew, and the resume is not exact. Were layers renamed, or options changed?",
            EffWarning,
            stacklevel=3,
        )


class Memory:
    """One role's estimate, and what has been observed since the last optimizer step.

    Args:
        estimate: what is updated.
        numbers: how many numbers one observation has.
    """

    def __init__(self, estimate: Any, numbers: int = 1) -> None:
        self.estimate = estimate
        self.numbers = numbers
        self.seen: Tensor | None = None
        self.learned = False
        """Whether the estimate comes from an optimizer step; some begin with the first tensor they see."""

    def observe(self, values: Tensor) -> None:
        """Take in an observation, shape () or (numbers,), on any device; nothing is synchronised."""
        values = values.detach().to(torch.float32, copy=True).reshape(self.numbers)
        self.seen = values if self.seen is None else torch.maximum(self.seen, values)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the estimate of a checkpoint; one from before the first step is no more than a new one."""
        self.learned = state != self.estimate.state_dict()
        self.estimate.load_state_dict(state)

    def forget(self) -> None:
        """Drop what has been observed since the last step."""
        self.seen = None


def learned(memories: Mapping[str, Memory], new: Mapping[str, Memory]) -> dict[str, Memory]:
    """``memories``, with new ones where no optimizer step has shown anything: an evaluation leaves no trace."""
    return {role: memory if memory.learned else new[role] for role, memory in memories.items()}


_NOTHING = -math.inf


def advance(memories: Sequence[Memory], device: torch.device, *, replicas: int | None = None) -> None:
    """Update every estimate with what was observed in the step; one synchronisation, one all-reduce with more ranks.

    Args:
        memories: equally many in the same order on every rank; one that several layers share may come several times.
        device: where the ranks' collective runs.
        replicas: with 1 the ranks hold different layers and nothing is reduced; None for one replica on every rank.
    """
    if not memories:
        return
    parts = [
        torch.full((m.numbers,), _NOTHING, dtype=torch.float32, device="cpu") if m.seen is None else m.seen
        for m in memories
    ]
    ranks = replicas != 1 and world_size() > 1
    seen = torch.cat([part.to(device) for part in parts])
    seen = torch.where(seen.isnan(), torch.inf, seen)  # every backend agrees on the largest of these
    if ranks:
        dist.all_reduce(seen, dist.ReduceOp.MAX)
    observed = dict(zip(memories, seen.cpu().split([m.numbers for m in memories]), strict=True))
    for memory, values in observed.items():
        memory.forget()
        if (found := values.tolist())[0] != _NOTHING:
            memory.estimate.update(*found)
            memory.learned = True
