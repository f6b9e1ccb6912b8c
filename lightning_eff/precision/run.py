"""What every precision plugin does when a run begins and ends: state of another run goes, steps are listened to."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from lightning_eff.integration.attached import trainer_of
from lightning_eff.integration.closure import AfterClosureMixin
from lightning_eff.optim.steps import STEPS, Closure
from lightning_eff.precision.gradients import zero_engine
from lightning_eff.precision.method import MethodMixin
from lightning_eff.runtime.runs import Run


class Aside(NamedTuple):
    """Holds what belongs to a fit, and an evaluation in between must not change."""

    seed: int | None
    calls: int
    weights_only: bool


class RunMixin(MethodMixin):
    """Tells a plugin where a run begins and ends, and of every step of every optimizer of its models."""

    _run: Run
    _aside: Aside | None = None

    def _start_run(self, module: nn.Module) -> bool:
        """Begin a run, or take in a model Fabric sets up; return whether it is a fit that goes on with the last one.

        An evaluation of the model that was trained uses what was learned of it, and leaves the state of the fit alone.
        Fabric does not tell of runs.
        """
        STEPS.add(self)
        trainer = trainer_of(module)
        if trainer is None:
            self._run.add(module)
            return False
        fits = trainer.state.fn == "fit"
        if not fits and self._run.is_of(module):
            self._aside = self._put_aside()
            return False
        goes_on = self._run.begin(trainer, module, fits=fits)
        if not goes_on:
            self._forget_run()
        return goes_on

    def _end_run(self) -> None:
        """Note that a run has ended, or was broken off."""
        STEPS.remove(self)
        self._run.end()
        if self._aside is not None:
            self._take_back(self._aside)
            self._aside = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Forget what is not the checkpoint's: a run takes up nothing else, also where that knows not the method."""
        super().on_load_checkpoint(checkpoint)
        self._forget_run()
        self._restart()

    def _forget_run(self) -> None:
        """Begin without what another run has left behind."""

    def _restart(self) -> None:
        """Let the models and optimizers of this run begin with the state there is now."""

    def _put_aside(self) -> Aside | None:
        """Return what an evaluation, which may load a checkpoint, must not change for a fit that goes on afterwards."""
        return None

    def _take_back(self, aside: Aside) -> None:
        """Undo :meth:`_put_aside`."""

    def before_step(self, optimizer: Optimizer, closure: Closure | None) -> Closure | None:
        """See :class:`lightning_eff.optim.steps.StepListener`."""
        return closure

    def after_step(self, optimizer: Optimizer) -> None:
        """See :class:`lightning_eff.optim.steps.StepListener`."""


class StepsMixin(RunMixin, AfterClosureMixin):
    """Sees every step of every optimizer of the models once, by whichever way it is taken, before and after it."""

    _told = False
    """Whether a step that Lightning tells of is under way, and not in its closure."""

    def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the optimizer and take in what has changed."""
        engine = zero_engine(kwargs.get("model"))
        steps = engine is None or engine.is_gradient_accumulation_boundary()  # DeepSpeed accumulates by itself
        closure = kwargs.pop("closure", None)
        if not self.is_told_after_closure():
            closure = self._guarded(closure)
        kwargs |= {} if closure is None else {"closure": partial(self._untold, closure)}
        self._told = True
        try:
            result = super().optimizer_step(optimizer, *args, **kwargs)
        finally:
            self._told = False
        if steps:
            self._take_in_step(optimizer)
        return result

    def _untold(self, closure: Closure) -> Any:
        """Run ``closure``, in which other, raw optimizers may step."""
        told, self._told = self._told, False
        try:
            return closure()
        finally:
            self._told = told

    def before_step(self, optimizer: Optimizer, closure: Closure | None) -> Closure | None:
        """Look at the gradients of a step that does not come through Lightning."""
        return closure if self._told or not self._run.has(optimizer) else self._guarded(closure)

    def after_step(self, optimizer: Optimizer) -> None:
        """Take in a step that did not come through Lightning."""
        if not self._told and self._run.has(optimizer):
            self._take_in_step(optimizer)

    def _guarded(self, closure: Closure | None) -> Closure | None:
        """Look at the gradients now, or each time ``closure`` has made them."""
        if closure is not None:
            return partial(self._evaluated, closure)
        self._look_at_gradients()
        return None

    def _evaluated(self, closure: Closure) -> Any:
        result = closure()
        self._look_at_gradients()
        return result

    def _look_at_gradients(self) -> None:
        """Look at the gradients before a step."""

    def _take_in_step(self, optimizer: Optimizer) -> None:
        """Take in that parameters have changed."""
