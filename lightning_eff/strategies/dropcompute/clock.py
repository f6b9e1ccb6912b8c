"""The clock of a window: it covers the device's work, and stands still where nothing is computed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from lightning_eff.integration.bases import StrategyBase
from lightning_eff.strategies.dropcompute.window import Window

__all__ = ["Clock", "HeldClock"]


class Clock:
    """Tells seconds, with the device's work done that they are to cover.

    On CUDA the host runs ahead of the device. Waiting for the micro-batch before the last one keeps the two together at
    the cost of a short queue; the time of a step lags behind by one micro-batch and is made good at its end.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] | None = [] if device.type == "cuda" else None

    def now(self, *, wait_for_all: bool = False) -> float:
        """Return the seconds of a steady clock."""
        if self._events is not None:
            self._events.append(torch.cuda.Event())
            self._events[-1].record()
            self._events[-1 if wait_for_all else max(len(self._events) - 2, 0)].synchronize()
            del self._events[:-1]
        return time.perf_counter()


class HeldClock(StrategyBase):
    """Stops a strategy's window in validation, in a checkpoint and at a barrier.

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
        super().on_validation_start()
        self._window.hold(self._clock.now())

    def on_validation_end(self) -> None:
        """Let the clock go on."""
        super().on_validation_end()
        self._window.release(self._clock.now())

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks, for instance for the one that writes a checkpoint."""
        with self._held():
            super().barrier(*args, **kwargs)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint."""
        with self._held():
            super().save_checkpoint(*args, **kwargs)
