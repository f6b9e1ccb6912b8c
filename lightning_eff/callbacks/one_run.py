"""A callback whose state belongs to one run."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lightning_eff.integration.bases import CallbackBase
from lightning_eff.optim.steps import STEPS, Closure
from lightning_eff.runtime.runs import Run


class OneRunMixin(CallbackBase):
    """Makes a callback begin each run anew, unless it goes on with the last one or a checkpoint is loaded for it.

    It also counts the optimizer steps of the run, because Lightning does not count those of raw optimizers.
    """

    def __init__(self) -> None:
        super().__init__()
        self._run = Run()
        self._own_steps = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget another run."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._own_steps = 0
            if not self._run.begin(trainer, pl_module):
                self._forget_run()
            STEPS.add(self)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Let a run take up the checkpoint's state alone; an evaluation takes up nothing."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn == "fit":
            self._own_steps = 0
            self._forget_run()
        else:  # Lightning would load the state next, and a fit that goes on later would begin with it
            checkpoint["callbacks"].pop(self.state_key, None)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Note where the run has ended."""
        super().teardown(trainer, pl_module, stage)
        self._end_run()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Note where the run was broken off."""
        super().on_exception(trainer, pl_module, exception)
        self._end_run()

    def _end_run(self) -> None:
        STEPS.remove(self)
        self._run.end()

    def _forget_run(self) -> None:
        """Begin without what another run has left behind."""

    def _is_due(self, every: int, step: int, before: int) -> bool:
        """Return whether one of ``every`` steps is the next, or was since ``before``: a batch may have several."""
        return (step + 1) // every > (before + 1) // every

    def _steps(self, at_least: int = 0) -> int:
        """Return the optimizer steps of the whole run so far; see :meth:`Run.steps`."""
        return self._run.steps(self._own_steps, at_least=at_least)

    def before_step(self, optimizer: Optimizer, closure: Closure | None) -> Closure | None:
        """See :class:`lightning_eff.optim.steps.StepListener`."""
        return closure

    def after_step(self, optimizer: Optimizer) -> None:
        """See :class:`lightning_eff.optim.steps.StepListener`."""
        self._own_steps += self._run.has(optimizer)
