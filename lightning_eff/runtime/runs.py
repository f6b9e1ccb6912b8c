"""To which run a piece of state belongs.

Plugins and callbacks may be used for one run after the other: a second fit, folds of a cross-validation, another
Trainer, another model. What they know of a run must not be there in the next one, unless that goes on with it.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

__all__ = ["Run"]


class Run:
    """Remembers the Trainer and the model of the last run, and how far it had come; a copy remembers none.

    A fit goes on with the last one if its Trainer and its model are the same objects, and the Trainer is where that fit
    ended (``trainer.fit_loop.max_epochs`` was raised, or it was interrupted). Any other fit is a new run; one that
    takes up a checkpoint is told by the checkpoint's being loaded.
    """

    def __init__(self) -> None:
        self._trainer: weakref.ref[Any] | None = None
        self._models: list[weakref.ref[nn.Module]] = []
        self._batches, self._fits = -1, False
        self._first = 0
        self._own: weakref.WeakSet[Any] = weakref.WeakSet()

    def __reduce__(self) -> tuple[type[Run], tuple[()]]:
        return Run, ()

    @property
    def trainer(self) -> Any:
        """The run's Trainer while there is one, else None."""
        return None if self._trainer is None else self._trainer()

    def is_of(self, model: nn.Module) -> bool:
        """Return whether ``model`` is the run's model."""
        return any(ref() is model for ref in self._models)

    def begin(self, trainer: Any, model: nn.Module, *, fits: bool = True) -> bool:
        """Note the run that begins; return whether it is a fit that goes on with the last one."""
        now = _batches(trainer) if fits else -1
        goes_on = self.trainer is trainer and self.is_of(model) and now == self._batches >= 0
        self._trainer, self._models, self._batches, self._fits = weakref.ref(trainer), [weakref.ref(model)], now, fits
        self._first, self._own = int(trainer.global_step), weakref.WeakSet()
        return goes_on

    def add(self, model: nn.Module) -> None:
        """Note one more model; without a Trainer (Fabric) there may be several."""
        if not self.is_of(model):
            self._models.append(weakref.ref(model))

    def end(self) -> None:
        """Note how far the fit has come."""
        if self._fits and self.trainer is not None:
            self._batches = _batches(self.trainer)

    def steps(self, own: int, *, at_least: int = 0) -> int:
        """Return the optimizer steps of the whole run, those before a resume counted.

        Lightning's count stands still where raw optimizers are used; then it is ``own``, counted since the run began or
        was taken up, after what was known then: Lightning's count, or ``at_least``.
        """
        if self.trainer is None:
            return own
        done = int(self.trainer.global_step)
        if not own:
            self._first = max(done, at_least)
        return max(done, self._first + own)

    def has(self, optimizer: Any) -> bool:
        """Return whether ``optimizer`` updates parameters of the run's models."""
        if optimizer not in self._own:
            models = (model for ref in self._models if (model := ref()) is not None)
            ours = {id(p) for model in models for p in model.parameters()}
            if not any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
                return False
            self._own.add(optimizer)
        return True


def _batches(trainer: Any) -> int:
    """Return the training batches that this Trainer has begun, less one; Lightning restores it with a checkpoint."""
    return int(trainer.fit_loop.total_batch_idx)
