"""Precision plugins for ``lightning.pytorch``; :mod:`lightning_eff.pytorch_lightning` has those of the other package.

The classes are made from Lightning-free mixins when they are first asked for. Strings (``precision="luq4"``) need no
import from here, and pick the right namespace and base class by themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_eff.integration.namespaces import class_getter, public_classes

# ---- written by tests/faces.py from the rows of the methods
if TYPE_CHECKING:
    from lightning.pytorch.plugins import Precision

    from lightning_eff.precision.bf16 import BF16Mixin
    from lightning_eff.precision.bf16_emulated import BF16EmulatedMixin
    from lightning_eff.precision.dfp16 import DFP16Mixin
    from lightning_eff.precision.fitted import FittedMixin
    from lightning_eff.precision.flexpoint import FlexpointMixin
    from lightning_eff.precision.fp8 import FP8Mixin
    from lightning_eff.precision.luq import LUQMixin

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


__all__ = [
    "BF16EmulatedPrecision",
    "BF16Precision",
    "DFP16Precision",
    "FP8Precision",
    "FittedPrecision",
    "FlexpointPrecision",
    "LUQPrecision",
]
# ---- end of what is written

_get = class_getter(__name__, "lightning.pytorch", public_classes("precision"))


def __getattr__(name: str) -> Any:
    return _get(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
