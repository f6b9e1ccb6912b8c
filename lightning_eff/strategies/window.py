"""One step's micro-batches on this rank: how long they took, and what all ranks made of the steps so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_eff.functional.dropcompute import starts_next


class Clock:
    """Seconds, with the device's work done that they are to cover.

    On CUDA the host runs ahead of the device. Waiting for the micro-batch before the last one keeps the two together at
    the cost of a short queue; the time of a step lags behind by one micro-batch and is made good at its end.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] | None = [] if device.type == "cuda" else None

    def now(self, *, wait_for_all: bool = False) -> float:
        """Seconds of a steady clock."""
        if self._events is not None:
            self._events.append(torch.cuda.Event())
            self._events[-1].record()
            self._events[-1 if wait_for_all else max(len(self._events) - 2, 0)].synchronize()
            del self._events[:-1]
        return time.perf_counter()


@dataclass
class Window:
    """The micro-batches of one optimizer step.

    Attributes:
        times: seconds of every micro-batch that was computed.
        losses: their losses, detached.
        offered: micro-batches so far, the dropped ones counted.
        started: when the step before it ended.
    """

    times: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    offered: int = 0
    started: float = 0.0

    def goes_on(self, now: float, *, tau: float, least: int, with_data: bool) -> bool:
        """Whether the next micro-batch is computed."""
        elapsed = now - self.started if with_data else sum(self.times)
        return starts_next(elapsed, len(self.times), tau=tau, min_micro_batches=least)


@dataclass
class Tally:
    """What all ranks did in the steps since it was last emptied; the same on every rank.

    Attributes:
        steps: optimizer steps.
        computed: micro-batches, all ranks together.
        dropped: micro-batches, all ranks together.
        seconds: wall time.
        waited_s: what the same steps would have taken had every rank computed all its micro-batches, those it dropped
            taking as long as its others did.
    """

    steps: int = 0
    computed: int = 0
    dropped: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0

    def add(self, counts: list[float], elapsed_s: list[float], offered: int, wall_s: float) -> None:
        """Take in a step: micro-batches and compute time of every rank, micro-batches offered, wall time."""
        whole = [e * offered / k if k else 0.0 for e, k in zip(elapsed_s, counts, strict=True)]
        self.steps += 1
        self.computed += round(sum(counts))
        self.dropped += offered * len(counts) - round(sum(counts))
        self.seconds += wall_s
        self.waited_s += wall_s + max(whole) - max(elapsed_s)

    @property
    def drop_rate(self) -> float:
        """Share of micro-batches that was not computed."""
        return self.dropped / max(self.computed + self.dropped, 1)

    @property
    def speedup(self) -> float:
        """Computed samples per second, relative to waiting."""
        return (1 - self.drop_rate) * self.waited_s / self.seconds if self.seconds else 1.0
