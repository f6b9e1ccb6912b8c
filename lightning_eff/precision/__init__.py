"""Precision plugins for ``lightning.pytorch``; :mod:`lightning_eff.pytorch_lightning` has those of the other package.

The classes are made from Lightning-free mixins when they are first asked for. Strings (``precision="luq4"``) need no
import from here, and pick the right namespace and base class by themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_eff.integration.namespaces import class_getter, public_classes

if TYPE_CHECKING:
    from lightning.pytorch.plugins import Precision

    from lightning_eff.precision.bf16 import BF16Mixin
    from lightning_eff.precision.bf16_emulated import BF16EmulatedMixin
    from lightning_eff.precision.dfp16 import DFP16Mixin
    from lightning_eff.precision.fitted import FittedMixin
    from lightning_eff.precision.flexpoint import FlexpointMixin
    from lightning_eff.precision.fp8 import FP8Mixin
    from lightning_eff.precision.luq import LUQMixin

    class BF16EmulatedPrecision(BF16EmulatedMixin, Precision):  # type: ignore[misc]
        """The bfloat16 study's recipe on any hardware: bfloat16 products, float32 everything else."""

    class BF16Precision(BF16Mixin, Precision):  # type: ignore[misc]
        """Weights in bfloat16, updated in float32 and written back without losing small updates."""

    class DFP16Precision(DFP16Mixin, Precision):  # type: ignore[misc]
        """int16 tensors with one exponent each, measured; integer products that cannot overflow."""

    class FP8Precision(FP8Mixin, Precision):  # type: ignore[misc]
        """8-bit floating point: E4M3 inputs and weights, E5M2 gradients; scales tensorwise, rowwise or delayed."""

    class FittedPrecision(FittedMixin, Precision):  # type: ignore[misc]
        """8- or 6-bit training, gradients in the float format that suits each layer."""

    class FlexpointPrecision(FlexpointMixin, Precision):  # type: ignore[misc]
        """int16 tensors with one exponent each, predicted by Autoflex from the steps before."""

    class LUQPrecision(LUQMixin, Precision):  # type: ignore[misc]
        """4-bit training: INT4 weights and activations, logarithmic unbiased FP4 gradients."""


__all__ = [
    "BF16EmulatedPrecision",
    "BF16Precision",
    "DFP16Precision",
    "FP8Precision",
    "FittedPrecision",
    "FlexpointPrecision",
    "LUQPrecision",
]

_get = class_getter(__name__, "lightning.pytorch", public_classes("precision"))


def __getattr__(name: str) -> Any:
    return _get(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
