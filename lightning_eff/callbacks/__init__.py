"""Callbacks for ``lightning.pytorch``; :mod:`lightning_eff.pytorch_lightning` has those of the other package.

The classes are made from Lightning-free mixins when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_eff.integration.namespaces import class_getter, public_classes

# ---- written by tests/faces.py from the rows of the methods
if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from lightning_eff.callbacks.gradients.pruning import GradientPruningMixin
    from lightning_eff.callbacks.gradients.statistics import GradientStatisticsMixin
    from lightning_eff.callbacks.precision.low_precision import LowPrecisionMixin
    from lightning_eff.callbacks.precision.luq_fine_tuning import LUQFineTuningMixin
    from lightning_eff.callbacks.run.non_finite_guard import NonFiniteGuardMixin

    class LowPrecision(LowPrecisionMixin, Callback):
        """Puts a low-precision method onto whatever precision plugin the Trainer has; needs no string."""

    class LUQFineTuning(LUQFineTuningMixin, Callback):
        """Trains the last steps of a luq4 run with INT4 weights alone."""

    class GradientPruning(GradientPruningMixin, Callback):
        """Unbiased pruning of the gradients at layer outputs to a set share of zeros."""

    class GradientStatistics(GradientStatisticsMixin, Callback):
        """Measures how wide neural gradients are and recommends a float format for each layer."""

    class NonFiniteGuard(NonFiniteGuardMixin, Callback):
        """Stops or skips a step with a NaN or Inf gradient or loss before it changes a parameter."""


__all__ = [
    "GradientPruning",
    "GradientStatistics",
    "LUQFineTuning",
    "LowPrecision",
    "NonFiniteGuard",
]
# ---- end of what is written

_get = class_getter(__name__, "lightning.pytorch", public_classes("callback"))


def __getattr__(name: str) -> Any:
    return _get(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
