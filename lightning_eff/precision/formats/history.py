"""What a layer carries from step to step: for each role of a tensor, an estimate made from the steps before.

Methods that predict a scale (delayed FP8, Autoflex, in-hindsight LUQ, fitted formats) all work alike. Within a step
every tensor is encoded with the estimate of the steps before it, and observed. After the optimizer step the
observations, the largest over micro-batches and ranks, update the estimate. So accumulation and recomputation change
nothing, replicas stay equal, and a checkpoint between two steps holds all there is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eff.errors import EffWarning, InternalError
from lightning_eff.runtime.ranks import world_size


class Estimate(Protocol):
    """Predicts from the past; plain numbers."""

    @property
    def update(self) -> Callable[..., object]:
        """Take in the numbers one optimizer step has shown; not finite where the step was broken."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""


Kind = TypeVar("Kind")


def warn_of_other_layers(method: str, saved: Mapping[str, Any], predicting: Collection[str]) -> None:
    """Warn of a checkpoint that does not remember the same layers as this run: their estimates begin anew.

    Args:
        method: whose checkpoint it is.
        saved: the estimates it holds, by layer.
        predicting: the layers of this run that have estimates; none if the model is not converted yet, or does without.
    """
    forgotten = sorted(set(predicting) - set(saved))
    gone = sorted(set(saved) - set(predicting))
    if forgotten:
        other = f" It remembers others, which are left out: {', '.join(gone[:8])}." if gone else ""
        warnings.warn(
            f"{method}: the checkpoint remembers nothing of {len(forgotten)} layers: {', '.join(forgotten[:8])}.{other}"
            " Their predictions begin anew, and the resume is not exact. Were layers renamed, or options changed?",
            EffWarning,
            stacklevel=3,
        )


class History:
    """Keeps one role's estimate, and what has been observed since the last optimizer step.

    Args:
        estimate: what is updated.
        numbers: how many numbers one observation has.
    """

    def __init__(self, estimate: Estimate, numbers: int = 1) -> None:
        self.estimate = estimate
        self.numbers = numbers
        self.seen: Tensor | None = None
        self.learned = False
        """Whether the estimate comes from an optimizer step; some begin with the first tensor they see."""

    def estimate_as(self, kind: type[Kind]) -> Kind:
        """Return the estimate as the format that made it knows it.

        Raises:
            InternalError: it is of another kind.
        """
        if not isinstance(self.estimate, kind):
            raise InternalError(f"internal error: {type(self.estimate).__name__} is no {kind.__name__}")
        return self.estimate

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


def learned(histories: Mapping[str, History], new: Mapping[str, History]) -> dict[str, History]:
    """Return ``histories``, new ones where no optimizer step has shown anything: an evaluation leaves no trace."""
    return {role: history if history.learned else new[role] for role, history in histories.items()}


_NOTHING = -math.inf


def advance(histories: Sequence[History], device: torch.device, *, replicas: int | None = None) -> None:
    """Update every estimate with what was observed in the step; one synchronisation, one all-reduce with more ranks.

    Args:
        histories: equally many in the same order on every rank; one that several layers share may come several times.
        device: where the ranks' collective runs.
        replicas: with 1 the ranks hold different layers and nothing is reduced; None for one replica on every rank.
    """
    if not histories:
        return
    parts = [
        torch.full((h.numbers,), _NOTHING, dtype=torch.float32, device="cpu") if h.seen is None else h.seen
        for h in histories
    ]
    ranks = replicas != 1 and world_size() > 1
    seen = torch.cat([part.to(device) for part in parts])
    seen = torch.where(seen.isnan(), torch.inf, seen)  # every backend agrees on the largest of these
    if ranks:
        dist.all_reduce(seen, dist.ReduceOp.MAX)
    observed = dict(zip(histories, seen.cpu().split([h.numbers for h in histories]), strict=True))
    for history, values in observed.items():
        history.forget()
        if (found := values.tolist())[0] != _NOTHING:
            history.estimate.update(*found)
            history.learned = True
