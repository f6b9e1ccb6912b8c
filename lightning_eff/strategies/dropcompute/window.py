"""One step's micro-batches on this rank: how long they took, and what all ranks made of the steps so far."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eff.functional.stragglers.threshold import starts_next


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
        started: when the step before it ended; later by as long as the clock was held.
        holds: how many have stopped the clock and not let it go on.
        held_at: when the first of them did.
    """

    times: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    offered: int = 0
    started: float = 0.0
    holds: int = 0
    held_at: float = 0.0

    def hold(self, now: float) -> None:
        """Stop the clock."""
        if self.holds == 0:
            self.held_at = now
        self.holds += 1

    def release(self, now: float) -> None:
        """Let the clock go on."""
        self.holds -= 1
        if self.holds == 0:
            self.started += now - self.held_at

    def goes_on(self, now: float, *, tau: float, least: int, with_data: bool) -> bool:
        """Whether the next micro-batch is computed."""
        elapsed = now - self.started if with_data else sum(self.times)
        return starts_next(elapsed, len(self.times), tau=tau, min_micro_batches=least)


@dataclass
class Measured:
    """Times of steps in which nothing was dropped, on this rank.

    Attributes:
        rows: of every step its micro-batches' seconds, then its wall time.
    """

    rows: list[list[float]] = field(default_factory=list)

    def gather(self) -> tuple[Tensor, Tensor]:
        """Every rank's micro-batch times, (I, N, M), and the time outside the loop, (I,); begin anew."""
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, torch.tensor(self.rows, dtype=torch.float64, device="cpu"))
        self.rows = []
        everyone = torch.stack(parts, dim=1)
        table, walls = everyone[..., :-1], everyone[..., -1]
        return table, (walls.mean(1) - table.sum(-1).amax(1)).clamp(min=0)


class HeldClock:
    """A strategy whose window stands still in validation, in a checkpoint and at a barrier.

    None of it is compute time, nor is it waiting for data.
    """

    _clock: Clock
    _window: Window

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        self._window.hold(self._clock.now())
        try:
            yield
        finally:
            self._window.release(self._clock.now())

    def on_validation_start(self) -> None:
        """Stop the clock."""
        super().on_validation_start()  # type: ignore[misc]
        self._window.hold(self._clock.now())

    def on_validation_end(self) -> None:
        """Let the clock go on."""
        super().on_validation_end()  # type: ignore[misc]
        self._window.release(self._clock.now())

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks, for instance for the one that writes a checkpoint."""
        with self._held():
            super().barrier(*args, **kwargs)  # type: ignore[misc]

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint."""
        with self._held():
            super().save_checkpoint(*args, **kwargs)  # type: ignore[misc]


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
