"""FNT: the fine-tuning phase at the end of 4-bit training, weights in INT4 and everything else in high precision.

References:
    Chmiel et al., Accurate Neural Training with 4-bit Matrix Multiplications at Standard Formats, ICLR 2023,
    arXiv:2112.10769, FNT (1 to 3 epochs, triangular learning rate).
"""

from __future__ import annotations

from typing import Any

from lightning_eff.checks import Maybe, Real, Whole, check
from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError
from lightning_eff.functional.luq import fnt_learning_rate
from lightning_eff.methods.state import ListOf, Record, read_state


def _rates_fit(found: dict[str, Any]) -> str:
    """Learning rates stand for the same parameter groups; before the phase there are no first ones yet."""
    before = not found["start_lrs"]
    fits = before or len(found["start_lrs"]) == len(found["base_lrs"])
    begun = found["start_step"] is not None or (before and not found["base_lrs"])
    return "" if fits and begun else "as many start_lrs (or none) as base_lrs, and a start_step where there are any"


_RATES = ListOf(Real(0))
STATE = Record({"start_step": Maybe(Whole()), "start_lrs": _RATES, "base_lrs": _RATES}, also=_rates_fit)
"""What is kept in a checkpoint."""


class LUQFineTuningMixin:
    """Train the last ``steps`` optimizer steps of a ``luq4`` run with INT4 weights alone.

    Inputs, gradients and products return to high precision, so these steps cost what they cost without the method.
    The learning rate of every parameter group rises linearly from its last value to ``base_lr`` and falls to zero; it
    overrides the schedulers' value in this phase.

    Args:
        steps: length of the phase in optimizer steps, at least 1.
        base_lr: peak of the triangle; default: the learning rate each parameter group had at the start of the run.

    Raises:
        ConfigurationError: ``steps`` or ``base_lr`` out of range; no known number of training steps.
        UnsupportedCombinationError: the Trainer's precision is not ``luq4``.

    State: ``start_step`` and, for each parameter group, ``start_lrs`` and ``base_lrs``.
    """

    def __init__(self, steps: int, base_lr: float | None = None) -> None:
        super().__init__()
        self.steps: int = check("steps", steps, Whole(1))
        self.base_lr: float | None = check("base_lr", base_lr, Maybe(Real(0, above=True)))
        self._start_step: int | None = None
        self._start_lrs: list[float] = []
        self._base_lrs: list[float] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that there is something to fine-tune, and when the phase begins."""
        if getattr(trainer.precision_plugin, "eff_method", None) != "luq4":
            raise UnsupportedCombinationError(
                f"LUQFineTuning continues a run with precision='luq4'; this Trainer has "
                f"precision={trainer.precision!r}. Use Trainer(precision='luq4') or remove the callback."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Fix the first step of the phase."""
        total = trainer.estimated_stepping_batches
        if not 0 < total < float("inf"):
            raise ConfigurationError(
                "LUQFineTuning needs to know where training ends; set max_steps or max_epochs (and a sized dataloader)."
            )
        if self._start_step is None:
            self._start_step = max(int(total) - self.steps, 0)
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            self._base_lrs = [self.base_lr or float(group.get("initial_lr", group["lr"])) for group in groups]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """In the phase: switch the plugin over, once, and set the learning rates."""
        if self._start_step is None or trainer.global_step < self._start_step:
            return
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if not self._start_lrs:
            self._start_lrs = [float(group["lr"]) for group in groups]
        if not trainer.precision_plugin.weights_only:
            trainer.precision_plugin.begin_fine_tuning()
        step = min(trainer.global_step - self._start_step, self.steps)
        for group, start, base in zip(groups, self._start_lrs, self._base_lrs, strict=True):
            group["lr"] = fnt_learning_rate(step, total=self.steps, start=start, base=base)

    def state_dict(self) -> dict[str, Any]:
        """The phase's place in the run, for resume."""
        return {"start_step": self._start_step, "start_lrs": self._start_lrs, "base_lrs": self._base_lrs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was made; a CheckpointError, and nothing changed, if the state is damaged."""
        remove = "del checkpoint['callbacks']['LUQFineTuning']"
        found = read_state(STATE, state_dict, of="LUQFineTuning", remove=remove)
        self._start_step, self._start_lrs, self._base_lrs = (found[key] for key in STATE.keys)
