"""Methods as somebody else would write them, a callback and a strategy, and many wrong versions of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from lightning_eff.checks import Real, Whole, check
from lightning_eff.errors import UnsupportedCombinationError
from lightning_eff.methods import MethodInfo
from lightning_eff.methods.state import Record

PAPER = "Somebody: Nudged gradients. 2020. https://example.org/nudge"
CARDS = Path(__file__).parent

# ------------------------------------------------------------------------------------------------------- a callback

NUDGE = MethodInfo(
    name="nudge",
    kind="callback",
    family="numerics",
    class_name="Nudge",
    mixin="tests.testing.third_party:Nudge",
    summary="Adds a little to every gradient, another little in every step.",
    paper=PAPER,
    conflicts={"bf16-true": "a little is nothing there; use 32-true"},
    state=Record({"calls": Whole()}),
    metrics={"eff/nudge/size": "what was added in the last step"},
)


class Nudge(Callback):
    """Adds a little to every gradient."""

    info = NUDGE

    def __init__(self, *, size: float = 0.01) -> None:
        self.size: float = check("size", size, Real(0))
        self.calls = 0

    @property
    def state_key(self) -> str:
        return "Nudge"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.precision == "bf16-true":
            raise UnsupportedCombinationError(
                f"Nudge cannot be combined with bf16-true: {NUDGE.conflicts['bf16-true']}"
            )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.calls += 1
        amount = self.size * math.sin(self.calls)
        if self.size:
            for parameter in pl_module.parameters():
                parameter.grad += amount
        self.report(pl_module, amount)

    def report(self, pl_module: Any, amount: float) -> None:
        pl_module.log("eff/nudge/size", amount)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls = state_dict["calls"]


class NeverNeutral(Nudge):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        next(pl_module.parameters()).grad[0, 0] += 1e-6


class Forgetful(Nudge):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class WithoutState(Nudge):
    def state_dict(self) -> dict[str, Any]:
        return {}


class SavesMore(Nudge):
    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "more": 1}


class SavesNegative(Nudge):
    def state_dict(self) -> dict[str, Any]:
        return {"calls": -self.calls}


class SavesAnObject(Nudge):
    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "path": Path()}


class ChangedBySaving(Nudge):
    def state_dict(self) -> dict[str, Any]:
        self.calls += 1
        return {"calls": self.calls}


class CountsValidation(Nudge):
    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.calls += 1


class Undocumented(Nudge):
    def report(self, pl_module: Any, amount: float) -> None:
        pl_module.log_dict({"eff/nudge/size": amount, "eff/nudge/sign": math.copysign(1.0, amount)})


class Silent(Nudge):
    def report(self, pl_module: Any, amount: float) -> None:
        pass


class RefusesNothing(Nudge):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pass


class RefusesUntyped(Nudge):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.precision == "bf16-true":
            raise ValueError("Nudge: not in bf16-true")


class RefusesNameless(Nudge):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.precision == "bf16-true":
            raise UnsupportedCombinationError("not in bf16-true")


class RefusesLate(Nudge):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pass

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)


class TakesAnything(Nudge):
    def __init__(self, *, size: float = 0.01) -> None:
        super().__init__()
        self.size = size


class LosesItsOptions(Nudge):
    def __reduce__(self) -> Any:
        return LosesItsOptions, ()


class CopiesItsRun(Nudge):
    """Copies go on counting, though a copy belongs to no run."""

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size, "calls": self.calls}


class Begins(Nudge):
    """Forgets the last run when another begins, as :class:`Nudge` should as well."""

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size, "calls": 0}


class ByRank(Nudge):
    """Every rank adds something else, behind the reduction."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.calls += trainer.global_rank
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


class WithoutRow(Nudge):
    info = None  # type: ignore[assignment]


# ------------------------------------------------------------------------------------------------------- a strategy

FADE = MethodInfo(
    name="fade",
    kind="strategy",
    family="numerics",
    class_name="FadeStrategy",
    mixin="tests.testing.third_party:FadeStrategy",
    summary="Shrinks gradients a little more with every step.",
    paper=PAPER,
    conflicts={"manual_optimization": "it has to know where a step ends"},
    state=Record({"steps": Whole()}),
    metrics={"eff/fade/factor": "what the gradient was multiplied with"},
)


class FadeStrategy(DDPStrategy):
    """Shrinks gradients a little more with every step."""

    info = FADE

    def __init__(self, *, rate: float = 0.99, process_group_backend: str | None = None) -> None:
        super().__init__(process_group_backend=process_group_backend)
        self.rate = rate
        self.steps = 0

    def setup(self, trainer: Any) -> None:
        if not trainer.lightning_module.automatic_optimization:
            raise UnsupportedCombinationError("'fade' needs automatic optimization.")
        super().setup(trainer)

    def factor(self) -> float:
        return float(self.rate**self.steps)

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        def faded() -> Any:
            result = closure()
            torch._foreach_mul_([p.grad for p in self.lightning_module.parameters()], self.factor())
            return result

        output = super().optimizer_step(optimizer, faded, model, **kwargs)
        self.lightning_module.log("eff/fade/factor", self.factor())
        self.steps += 1
        return output

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        checkpoint["FadeStrategy"] = {"steps": self.steps}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        super().load_optimizer_state_dict(checkpoint)
        self.steps = checkpoint.get("FadeStrategy", {"steps": 0})["steps"]


class DriftingStrategy(FadeStrategy):
    """Ranks end with other weights."""

    def factor(self) -> float:
        return super().factor() * (1 + self.global_rank)


if "fade" not in StrategyRegistry.available_strategies():
    StrategyRegistry.register("fade", FadeStrategy)
