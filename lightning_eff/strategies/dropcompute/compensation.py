"""Steps added to ``max_steps`` for micro-batches that were dropped, and whose they are."""

from __future__ import annotations

from typing import Any


class Compensation:
    """Keeps account of the steps added to one Trainer's ``max_steps``.

    They stay added when the run ends: a second fit that goes on begins with them. Where what was dropped is counted
    anew, for another model or from a checkpoint, they are taken back first.
    """

    def __init__(self) -> None:
        self._trainer: Any = None
        self._added = self._base = self._made_good = 0
        self._longer = 0  # what max_steps was afterwards: another value is somebody else's

    def go_on(self, trainer: Any, dropped: int) -> None:
        """Begin a run in which ``dropped`` micro-batches have been made up for."""
        if trainer is not self._trainer or trainer.max_steps != self._longer:
            self._added = 0
        self._trainer, self._base, self._made_good = trainer, self._added, dropped

    def forget(self, trainer: Any) -> None:
        """Take back what was added to this Trainer's ``max_steps``: nothing has been dropped."""
        if trainer is self._trainer and trainer.max_steps == self._longer:
            trainer.fit_loop.epoch_loop.max_steps -= self._added
        self._trainer, self._added, self._base, self._made_good = trainer, 0, 0, 0

    def lengthen(self, trainer: Any, dropped: int, step: int) -> None:
        """Add a step for every ``step`` micro-batches dropped so far."""
        wanted = self._base + (dropped - self._made_good) // step
        trainer.fit_loop.epoch_loop.max_steps += wanted - self._added
        self._added, self._longer = wanted, trainer.max_steps
