"""A guard in front of the optimizer: NaN and Inf are stopped before they reach a parameter.

What a loss scaler does for fp16, skipping a step with non-finite gradients, is done here for every other precision,
with names; or the run ends there, before its weights are lost.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_eff.callbacks.one_run import OneRunMixin
from lightning_eff.checks import Choice, Whole, check
from lightning_eff.errors import EffWarning, NoEffectWarning, NonFiniteGradientError, UnsupportedCombinationError
from lightning_eff.integration.graft import check_strategy, method_of
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.optim.steps import Closure
from lightning_eff.runtime.finite import FIND_OPERATION, SHOWN, stop_if_broken

Answer = Literal["raise", "warn", "skip"]
Named = list[tuple[str, Tensor]]


class NonFiniteGuardMixin(OneRunMixin):
    """Stop, skip or announce an optimizer step whose gradient or loss is NaN or Inf, before a parameter is changed.

    It looks after backward and before clipping, at every element of every gradient the optimizer is about to use and at
    the losses they come from; one pass and one synchronisation a step, and on several ranks one all-reduce of one
    number. All ranks decide alike. While everything is finite, the run has the same bits as without it. A skipped step
    leaves parameters and the optimizer's state as they were and still counts: for schedulers, and for ``max_steps``.

    With a loss scaler (``16-mixed``) it stands aside and says so: the scaler skips such steps by itself, and has to see
    them to find its scale.

    Args:
        on_nonfinite: ``"raise"`` ends the run, ``"warn"`` only says it, ``"skip"`` leaves the step out.
        max_skipped_steps: steps that may be skipped one after the other; one more raises: training stands still.

    Raises:
        ConfigurationError: an argument out of range.
        UnsupportedCombinationError: at the start of fit, a strategy that does not keep whole gradients.
        NonFiniteGradientError: on every rank, at a step with NaN or Inf.

    State: ``skipped``, steps of the run that were left out, and ``in_a_row``, those of them just before the checkpoint.
    """

    info: ClassVar[MethodInfo] = METHODS["non_finite_guard"]

    def __init__(self, *, on_nonfinite: Answer = "raise", max_skipped_steps: int = 10) -> None:
        super().__init__()
        self.on_nonfinite: Answer = check("on_nonfinite", on_nonfinite, Choice("raise", "warn", "skip"))
        self.max_skipped_steps: int = check("max_skipped_steps", max_skipped_steps, Whole(1))
        self._forget_run()

    def _forget_run(self) -> None:
        """Begin without what another run has left behind."""
        self._skipped = self._in_a_row = 0
        self._forget_step()

    def _forget_step(self) -> None:
        """Begin a step: nothing has been looked at, no loss was broken."""
        self._looked, self._broken_loss = False, torch.zeros((), dtype=torch.bool, device="cpu")

    # ------------------------------------------------------------------------------------------ Lightning's hooks

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what has not been shown to work; say where there is nothing to do."""
        strategy = method_of(trainer.strategy)
        if strategy is not None and strategy.name in self.info.conflicts:
            raise UnsupportedCombinationError(
                f"{self.info.class_name} cannot be combined with {strategy.class_name}: "
                f"{self.info.conflicts[strategy.name]}."
            )
        check_strategy(self.info, trainer.strategy)
        if _has_scaler(trainer):
            warnings.warn(
                f"{self.info.class_name} stands aside: the loss scaler of precision={trainer.precision!r} skips steps "
                "with NaN or Inf by itself.",
                NoEffectWarning,
                stacklevel=2,
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin with a whole step."""
        self._forget_step()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Note whether a loss is finite; nobody waits for the answer yet."""
        self._broken_loss = self._broken_loss.to(loss.device) | ~torch.isfinite(loss.detach()).all()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Look at the gradients of a step that Lightning makes, before they are clipped."""
        self._look(trainer, optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log how many steps were skipped."""
        if self.on_nonfinite == "skip" and not trainer.barebones:
            pl_module.log(f"eff/{self.info.name}/skipped", float(self._skipped))

    def before_step(self, optimizer: Optimizer, closure: Closure | None) -> Closure | None:
        """Look at the gradients of a step that Lightning does not know of."""
        if not self._run.has(optimizer):
            return closure
        if closure is not None:
            return functools.partial(self._evaluate, optimizer, closure)
        if not self._looked:
            self._look(self._run.trainer, optimizer)
        return None

    def _evaluate(self, optimizer: Optimizer, closure: Closure) -> Any:
        """Make the gradients, and look at them if that has not been done on the way."""
        self._looked = False
        result = closure()
        if not self._looked:
            self._look(self._run.trainer, optimizer)
        return result

    def after_step(self, optimizer: Optimizer) -> None:
        """See :class:`lightning_eff.optim.steps.StepListener`."""
        super().after_step(optimizer)
        if self._run.has(optimizer):
            self._looked = False

    # ------------------------------------------------------------------------------------------ looking

    def _look(self, trainer: Any, optimizer: Optimizer) -> None:
        """Stop, skip or announce the step if anything in it is NaN or Inf on any rank."""
        if _has_scaler(trainer):
            return
        device, broken_loss = trainer.strategy.root_device, self._broken_loss
        gradients = _gradients(trainer.lightning_module, optimizer)
        suspicious = torch.stack([broken_loss.to(device), *(~torch.isfinite(g.sum()).to(device) for _, g in gradients)])
        names: list[str] = []
        losses: list[int] = []
        ranks = int(trainer.world_size)  # not the process group's: it may hold runs that know nothing of each other
        if _on_any_rank(suspicious.any(), ranks):
            broken = [name for name, grad in gradients if not bool(torch.isfinite(grad).all())]
            names, losses = _of_all_ranks(broken, bool(broken_loss), ranks)
        if names or losses:
            place = f"at optimizer step {self._steps()} (rank {trainer.global_rank})"
            self._answer(optimizer, names, losses, place=place, of=len(gradients))
        else:
            self._in_a_row = 0
        self._forget_step()
        self._looked = True

    def _answer(
        self, optimizer: Optimizer, names: Sequence[str], losses: Sequence[int], *, place: str, of: int
    ) -> None:
        """Do what was asked for; the same on every rank."""
        loss = f"the loss of rank {', '.join(map(str, losses))}" if losses else ""
        where = f"{place}, as is {loss}," if loss else place
        if self.on_nonfinite == "skip":
            what = f"the gradient is NaN or Inf {where} in {', '.join(names[:SHOWN])}"
            self._skip(optimizer, what if names else f"{loss} is NaN or Inf {place}, though no gradient is")
        elif names:
            advice = f"{FIND_OPERATION}; on_nonfinite='skip' leaves such steps out"
            stop_if_broken(self.info.name, names, where=where, on_nonfinite=self.on_nonfinite, of=of, advice=advice)
        else:
            self._stop_for_loss(f"{self.info.name}: {loss} is NaN or Inf {place}, though no gradient is.")

    def _stop_for_loss(self, message: str) -> None:
        if self.on_nonfinite == "raise":
            raise NonFiniteGradientError(
                f"{message} No parameter was changed in this step. Look at what is added to the loss without a "
                "gradient; on_nonfinite='warn' goes on regardless."
            )
        warnings.warn(f"{message} The optimizer step goes on as asked.", EffWarning, stacklevel=2)

    def _skip(self, optimizer: Optimizer, what: str) -> None:
        """Take the gradients away: without one, an optimizer of torch changes neither parameter nor state."""
        if self._in_a_row >= self.max_skipped_steps:
            raise NonFiniteGradientError(
                f"{self.info.name}: {what}, after max_skipped_steps={self.max_skipped_steps} skipped steps in a row: "
                "training stands still. No parameter was changed in this step. Lower the learning rate or look at the "
                "data."
            )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self._skipped += 1
        self._in_a_row += 1
        message = f"{self.info.name}: {what}. The step is skipped, {self._skipped} so far in this run."
        warnings.warn(message, EffWarning, stacklevel=2)

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"skipped": self._skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting; a CheckpointError, and nothing changed, if the state is damaged."""
        found = self.info.read_state(state_dict)
        self._skipped, self._in_a_row = found["skipped"], found["in_a_row"]


def _has_scaler(trainer: Any) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _gradients(model: Any, optimizer: Optimizer) -> Named:
    """Names and gradients of the parameters an optimizer is about to update; of sparse ones the values."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    found = [(names.get(id(p), "(unnamed)"), p.grad.detach()) for p in parameters if p.grad is not None]
    return [(name, grad.coalesce().values() if grad.is_sparse else grad) for name, grad in found]


def _on_any_rank(suspicious: Tensor, ranks: int) -> bool:
    """Whether something may be broken on a rank; one all-reduce of one number."""
    flag = suspicious.float()
    if ranks > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _of_all_ranks(names: list[str], loss: bool, ranks: int) -> tuple[list[str], list[int]]:
    """Return the parameters that any rank names, and the ranks whose loss is broken."""
    told: list[tuple[list[str], bool]] = [(names, loss)] * ranks
    if ranks > 1:
        dist.all_gather_object(told, (names, loss))
    every = dict.fromkeys(name for found, _ in told for name in found)
    return list(every), [number for number, (_, broken) in enumerate(told) if broken]
