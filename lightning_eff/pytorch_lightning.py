"""The same plugins and callbacks, for projects on the standalone package ``pytorch_lightning``.

Its classes and those of ``lightning.pytorch`` do not accept each other, so instances must come from the matching side:
``from lightning_eff.pytorch_lightning import LUQPrecision``. Strings need no import from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_eff.integration.namespaces import class_getter, public_classes

# ---- written by tests/faces.py from the rows of the methods
# A mixin is typed for one Lightning and stands in front of the classes of each: "incompatible base classes".
# mypy: disable-error-code="misc"
if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback
    from pytorch_lightning.plugins import Precision
    from pytorch_lightning.strategies import DDPStrategy

    from lightning_eff.callbacks.gradients.pruning import GradientPruningMixin
    from lightning_eff.callbacks.gradients.statistics import GradientStatisticsMixin
    from lightning_eff.callbacks.precision.low_precision import LowPrecisionMixin
    from lightning_eff.callbacks.precision.luq_fine_tuning import LUQFineTuningMixin
    from lightning_eff.callbacks.run.non_finite_guard import NonFiniteGuardMixin
    from lightning_eff.precision.bf16 import BF16Mixin
    from lightning_eff.precision.bf16_emulated import BF16EmulatedMixin
    from lightning_eff.precision.dfp16 import DFP16Mixin
    from lightning_eff.precision.fitted import FittedMixin
    from lightning_eff.precision.flexpoint import FlexpointMixin
    from lightning_eff.precision.fp8 import FP8Mixin
    from lightning_eff.precision.luq import LUQMixin
    from lightning_eff.strategies.dropcompute.strategy import DropComputeMixin
    from lightning_eff.strategies.pipelined_bp.strategy import PipelinedBPMixin

    class LUQPrecision(LUQMixin, Precision):
        """4-bit training: INT4 weights and activations, logarithmic unbiased FP4 gradients."""

    class FP8Precision(FP8Mixin, Precision):
        """8-bit floating point: E4M3 inputs and weights, E5M2 gradients, one dynamic scale per tensor.

        With ``scaling="rowwise"``: 8-bit floating point: E4M3 everywhere, a dynamic scale for each row of a product.
        With ``scaling="delayed"``: 8-bit floating point: E4M3 and E5M2, scales from the largest magnitudes of the steps
            before.
        """

    class FittedPrecision(FittedMixin, Precision):
        """8-bit training: E4M3 inputs and weights, gradients in the float format that suits each layer.

        With ``bits=6``: 6-bit training: E2M3 inputs and weights, gradients in the float format that suits each layer.
        """

    class FlexpointPrecision(FlexpointMixin, Precision):
        """int16 tensors with one exponent each, predicted by Autoflex from the steps before."""

    class DFP16Precision(DFP16Mixin, Precision):
        """int16 tensors with one exponent each, measured; integer products that cannot overflow."""

    class BF16EmulatedPrecision(BF16EmulatedMixin, Precision):
        """The bfloat16 study's recipe on any hardware: bfloat16 products, float32 everything else."""

    class BF16Precision(BF16Mixin, Precision):
        """bfloat16 weights, updated by any optimizer with stochastic rounding; nothing more is kept.

        With ``update="kahan"``: bfloat16 weights, updated by any optimizer with Kahan compensation; 2 bytes more per
            weight.
        With ``update="split"``: bfloat16 weights, the missing 16 bits beside the optimizer: float32 updates in 4 bytes.
        """

    class DropComputeStrategy(DropComputeMixin, DDPStrategy):
        """Data parallelism that does not wait for stragglers: late ranks drop micro-batches."""

    class PipelinedBPStrategy(PipelinedBPMixin, DDPStrategy):
        """Pipeline parallelism without bubble: stages update at once and allow for late gradients."""

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
    "BF16EmulatedPrecision",
    "BF16Precision",
    "DFP16Precision",
    "DropComputeStrategy",
    "FP8Precision",
    "FittedPrecision",
    "FlexpointPrecision",
    "GradientPruning",
    "GradientStatistics",
    "LUQFineTuning",
    "LUQPrecision",
    "LowPrecision",
    "NonFiniteGuard",
    "PipelinedBPStrategy",
]
# ---- end of what is written

_get = class_getter(
    __name__,
    "pytorch_lightning",
    {**public_classes("precision"), **public_classes("strategy"), **public_classes("callback")},
)


def __getattr__(name: str) -> Any:
    return _get(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
