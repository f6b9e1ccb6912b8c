"""FNT: the fine-tuning phase at the end of 4-bit training, weights in INT4 and everything else in high precision.

References:
    Chmiel et al., Accurate Neural Training with 4-bit Matrix Multiplications at Standard Formats, ICLR 2023,
    arXiv:2112.10769, FNT (1 to 3 epochs, triangular learning rate).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.optim import Optimizer

from lightning_eff.callbacks.one_run import OneRunMixin
from lightning_eff.checks import Maybe, Real, Whole, check
from lightning_eff.errors import ConfigurationError, EffWarning, UnsupportedCombinationError
from lightning_eff.functional.numerics.luq import fnt_learning_rate
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.methods.state import read_state
from lightning_eff.optim.steps import Closure
from lightning_eff.runtime.contracts import FineTuned


@dataclass
class _Group:
    """Holds what the phase knows of one parameter group."""

    base: float
    start: float | None = None
    scheduled: Any = None
    """The learning rate the schedule has given it, while ``ours`` is in its place."""
    ours: float | None = None

    def override(self, group: dict[str, Any], step: int, total: int) -> None:
        """Put the phase's learning rate in place of the schedule's."""
        if self.ours is None or group["lr"] is not self.ours:
            self.scheduled = group["lr"]
        if self.start is None:
            self.start = float(self.scheduled)
        group["lr"] = self.ours = fnt_learning_rate(step, total=total, start=self.start, base=self.base)

    def restore(self, group: dict[str, Any]) -> None:
        """Put the schedule's learning rate back, unless somebody has set another."""
        if self.ours is not None and group["lr"] is self.ours:
            group["lr"] = self.scheduled
        self.scheduled = self.ours = None


class LUQFineTuningMixin(OneRunMixin):
    """Train the last ``steps`` optimizer steps of a ``luq4`` run with INT4 weights alone.

    Inputs, gradients and products return to high precision, so these steps cost what they cost without the method.
    The learning rate of every parameter group rises linearly from its last value to ``base_lr`` and falls to zero; it
    overrides the schedulers' value in these steps, and is put back after each.

    The phase is where the run ends: when a run goes on for more epochs, from a checkpoint or in a second fit of the
    same Trainer, the phase moves. If it had begun, training returns to 4 bits and the schedule's learning rate until
    then, with a warning. In manual optimization, where a batch may have any number of steps, it is counted in batches.

    Args:
        steps: length of the phase in optimizer steps, at least 1.
        base_lr: peak of the triangle; default: the learning rate each parameter group had at the start of the run, or
            when it was added.

    Raises:
        ConfigurationError: ``steps`` or ``base_lr`` out of range; no known number of training steps; in manual
            optimization ``max_steps`` below the number of batches in ``max_epochs``.
        UnsupportedCombinationError: the Trainer's precision is not ``luq4``.

    State: ``start_step`` and, for each parameter group, ``start_lrs`` and ``base_lrs``.
    """

    info: ClassVar[MethodInfo] = METHODS["luq_fine_tuning"]

    def __init__(self, steps: int, base_lr: float | None = None) -> None:
        super().__init__()
        self.steps: int = check("steps", steps, Whole(1))
        self.base_lr: float | None = check("base_lr", base_lr, Maybe(Real(0, above=True)))
        self._forget_run()

    def _forget_run(self) -> None:
        """Begin without what another run has left behind."""
        self._start_step: int | None = None
        self._start_lrs: list[float] = []
        self._base_lrs: list[float] = []
        self._groups: dict[tuple[int, int], _Group] = {}
        self._step: int | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that there is something to fine-tune, and when the phase begins."""
        if getattr(trainer.precision_plugin, "eff_method", None) != "luq4":
            raise UnsupportedCombinationError(
                f"LUQFineTuning continues a run with precision='luq4'; this Trainer has "
                f"precision={trainer.precision!r}. Use Trainer(precision='luq4') or remove the callback."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the end is known, and note the learning rates before the first step."""
        if not 0 < trainer.estimated_stepping_batches < float("inf"):
            raise ConfigurationError(
                "LUQFineTuning needs to know where training ends; set max_steps or max_epochs (and a sized dataloader)."
            )
        batches = trainer.num_training_batches * trainer.max_epochs
        if not pl_module.automatic_optimization and 0 <= trainer.max_steps < batches:
            raise ConfigurationError(
                f"LUQFineTuning cannot tell at which batch a run with manual optimization ends that has both "
                f"max_epochs={trainer.max_epochs} and max_steps={trainer.max_steps}; give the Trainer one of them."
            )
        self._step = None
        known = itertools.zip_longest(self._base_lrs, self._start_lrs)
        groups = zip(_param_groups(trainer), known, strict=False)
        self._groups = {key: _Group(base, start) for (key, _), (base, start) in groups}
        self._note_groups(trainer)
        self._keep_lists()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Find out where the run ends now; in the phase switch the plugin over, once, and set the learning rates."""
        self._note_groups(trainer)
        done, left = _place(trainer, batch_idx)
        self._move_to(max(done + left - self.steps, 0), done, trainer)
        in_phase = self._start_step is not None and done >= self._start_step
        self._step = min(done - (self._start_step or 0), self.steps) if in_phase else None
        plugin: FineTuned = trainer.precision_plugin
        if in_phase and not plugin.weights_only:
            plugin.begin_fine_tuning()
        elif plugin.weights_only and not in_phase:
            plugin.end_fine_tuning()
        self._override(trainer)
        self._keep_lists()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Put the schedule's learning rates back after a micro-batch without a step."""
        self._restore(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the schedule's learning rates back."""
        self._restore(trainer)
        super().on_exception(trainer, pl_module, exception)

    def before_step(self, optimizer: Optimizer, closure: Closure | None) -> Closure | None:
        """Set the learning rates, also for the second step in a batch."""
        self._override(self._run.trainer, optimizer)
        return closure

    def after_step(self, optimizer: Optimizer) -> None:
        """Put the schedule's learning rates back before the schedulers step."""
        super().after_step(optimizer)
        self._restore(self._run.trainer, optimizer)

    # ------------------------------------------------------------------------------------------ place and rates

    def _move_to(self, start: float, done: int, trainer: Any) -> None:
        """Let the phase begin at ``start``; say so if it had begun already."""
        before, self._start_step = self._start_step, int(start) if math.isfinite(start) else None
        had_begun = any(known.start is not None for known in self._groups.values())
        if not had_begun or (self._start_step is not None and done >= self._start_step):
            return
        for known in self._groups.values():
            known.start = None
        rates = ", ".join(f"{float(group['lr']):.3g}" for _, group in _param_groups(trainer))
        warnings.warn(
            f"LUQFineTuning: the run goes on beyond its first end, so the fine-tuning phase, which began at step "
            f"{before}, moves to step {self._start_step}. Until then training is in 4 bits again, with the schedule's "
            f"learning rates (now {rates}).",
            EffWarning,
            stacklevel=2,
        )

    def _note_groups(self, trainer: Any) -> None:
        """Take in groups that were added, drop those that are gone."""
        self._groups = {key: self._groups.get(key) or self._new(group) for key, group in _param_groups(trainer)}

    def _keep_lists(self) -> None:
        """List what a checkpoint holds, in the order of the groups."""
        self._base_lrs = [known.base for known in self._groups.values()]
        starts = [known.start for known in self._groups.values()]
        self._start_lrs = [start for start in starts if start is not None]

    def _new(self, group: dict[str, Any]) -> _Group:
        return _Group(self.base_lr or float(group.get("initial_lr", group["lr"])))

    def _override(self, trainer: Any, optimizer: Optimizer | None = None) -> None:
        if self._step is not None:
            for key, group in _param_groups(trainer, optimizer):
                self._groups.setdefault(key, self._new(group)).override(group, self._step, self.steps)

    def _restore(self, trainer: Any, optimizer: Optimizer | None = None) -> None:
        for key, group in _param_groups(trainer, optimizer):
            if key in self._groups:
                self._groups[key].restore(group)

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return the phase's place in the run, for resume."""
        return {"start_step": self._start_step, "start_lrs": self._start_lrs, "base_lrs": self._base_lrs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was made.

        Raises:
            CheckpointError: the state is damaged; nothing is changed.
        """
        info = self.info
        found = read_state(info.state, state_dict, of=info.class_name, remove=info.remove_state)
        self._start_step, self._start_lrs, self._base_lrs = (found[key] for key in info.state_keys)


def _param_groups(trainer: Any, only: Optimizer | None = None) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Yield every parameter group of the Trainer's optimizers, known by optimizer and first parameter."""
    for place, optimizer in enumerate(() if trainer is None else trainer.optimizers):
        if only is None or only is optimizer:
            for group in optimizer.param_groups:
                yield (place, id(next(iter(group["params"]), group))), group


def _place(trainer: Any, batch_idx: int) -> tuple[int, float]:
    """Return the steps done and left, from what is set now; in manual optimization batches, if epochs end the run."""
    manual = not trainer.lightning_module.automatic_optimization
    micro_batches = 1 if manual else trainer.accumulate_grad_batches
    done, left = int(trainer.global_step), math.inf
    if trainer.max_epochs != -1 and math.isfinite(trainer.num_training_batches):
        steps = math.ceil(trainer.num_training_batches / micro_batches)
        left = steps * (trainer.max_epochs - trainer.current_epoch) - batch_idx // micro_batches
        if manual:
            return int(trainer.fit_loop.total_batch_idx), left
    if trainer.max_steps != -1:
        left = min(left, trainer.max_steps - done)
    return done, left
