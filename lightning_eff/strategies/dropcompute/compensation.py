"""Steps added to a Trainer's ``max_steps`` for micro-batches that were dropped, taken back where they are no more."""

from __future__ import annotations

from typing import Any

from lightning_eff.integration.loop import add_steps

__all__ = ["Compensation"]


class Compensation:
    """Keeps account of the optimizer steps added to one Trainer's ``max_steps``.

    They stay added when the run ends: a second fit that goes on begins with them. Where what was dropped is counted
    anew, for another model or from a checkpoint, they are taken back first.
    """

    def __init__(self) -> None:
        self._trainer: Any = None
        self._added = 0  # to max_steps, by this and earlier runs
        self._added_before = 0  # of these by earlier runs
        self._made_good = 0  # micro-batches that earlier runs have made up for
        self._longer = 0  # what max_steps was afterwards: another value is somebody else's

    def begin_run(self, trainer: Any, dropped: int) -> None:
        """Begin a run in which ``dropped`` micro-batches have been made up for."""
        if trainer is not self._trainer or trainer.max_steps != self._longer:
            self._added = 0
        self._trainer = trainer
        self._added_before = self._added
        self._made_good = dropped

    def forget(self, trainer: Any) -> None:
        """Take back what was added to this Trainer's ``max_steps``: nothing has been dropped."""
        if trainer is self._trainer and trainer.max_steps == self._longer:
            add_steps(trainer, -self._added)
        self._trainer = trainer
        self._added = self._added_before = self._made_good = 0

    def lengthen(self, trainer: Any, dropped: int, per_step: int) -> None:
        """Add a step for every ``per_step`` micro-batches dropped so far.

        Args:
            trainer: Lightning's.
            dropped: micro-batches dropped so far, all ranks together.
            per_step: micro-batches of a full step, all ranks together: N M.
        """
        # One step of N M micro-batches for every N M that were dropped in this run.
        wanted = self._added_before + (dropped - self._made_good) // per_step
        add_steps(trainer, wanted - self._added)
        self._added = wanted
        self._longer = trainer.max_steps
