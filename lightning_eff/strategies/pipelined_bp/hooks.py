"""What a pipeline changes of the optimizer, its schedulers, clipping and precision; each change is undone."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from lightning_eff.runtime.contracts import ScalePredictor
from lightning_eff.runtime.patches import Undo, replace_attribute
from lightning_eff.strategies.pipelined_bp.weights import Weights


@contextlib.contextmanager
def replace_step(optimizer: torch.optim.Optimizer, update: Callable[[Callable[[], Any]], None]) -> Iterator[None]:
    """Let ``optimizer.step(closure)`` run the closure, then ``update`` with the optimizer's own step, inside the block.

    The closure is Lightning's: forward, backward, hooks and clipping.
    """
    original = optimizer.step

    def step(closure: Callable[[], Any]) -> Any:
        result = closure()
        update(original)
        return result

    undo = replace_attribute(optimizer, "step", step)
    try:
        yield
    finally:
        undo()


class SchedulerSteps:
    """Delays the steps of schedulers, so that learning rates change for the same sample on every stage.

    Lightning steps schedulers after a batch. On an early stage the update of that batch is still to come, and the
    scheduler waits for it.

    Args:
        model: the LightningModule.
        weights: returns those of this rank's stages, or None as long as there are none.
    """

    def __init__(self, model: Any, weights: Callable[[], Weights | None]) -> None:
        self._model, self._weights = model, weights
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._step = model.lr_scheduler_step

    def install(self) -> Undo:
        """Let the model's ``lr_scheduler_step`` wait for the update it belongs to."""
        return replace_attribute(self._model, "lr_scheduler_step", self._later)

    def _later(self, scheduler: Any, metric: Any) -> None:
        weights = self._weights()
        due = 0 if weights is None else weights.samples
        self._waiting.append((due, lambda: self._step(scheduler, metric)))
        self.run_due()

    def run_due(self) -> None:
        """Step schedulers whose update has been made."""
        weights = self._weights()
        done = 0 if weights is None else weights.updates
        while self._waiting and self._waiting[0][0] <= done:
            self._waiting.popleft()[1]()


def clip_by_stage(plugin: Any, weights: Callable[[], Weights | None]) -> Undo:
    """Clip the gradients of every stage by themselves: those of other stages belong to other samples."""
    clip = plugin.clip_gradients

    def clip_gradients(optimizer: Any, *args: Any, **kwargs: Any) -> None:
        ours, whole = weights(), optimizer.param_groups
        if ours is None or not (args[0] if args else kwargs.get("clip_val")):
            return
        for stage in ours.stages:
            if all(p.grad is None for p in stage.parameters):  # the pipeline fills; torch refuses to clip nothing
                continue
            optimizer.param_groups = [{**group, "params": own} for group, own in ours.groups(stage)]
            try:
                clip(optimizer, *args, **kwargs)
            finally:
                optimizer.param_groups = whole

    return replace_attribute(plugin, "clip_gradients", clip_gradients)


def precision_unchanged(plugin: object) -> AbstractContextManager[None]:
    """Return a context that keeps nothing of what quantised layers draw and observe inside, nor predicted scales."""
    return plugin.unchanged() if isinstance(plugin, ScalePredictor) else contextlib.nullcontext()
