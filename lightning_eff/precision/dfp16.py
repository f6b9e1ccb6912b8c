"""``precision="dfp16"``: 16-bit integers with a shared exponent, products on integer units.

References:
    Das et al., Mixed Precision Training of Convolutional Neural Networks using Integer Operations, ICLR 2018,
    arXiv:1802.00930. Beyond its abstract the recipe is from memory, every formula derived again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.precision.formats.base import LayerOptions, Products
from lightning_eff.precision.formats.shared_exponent import DFP16Options
from lightning_eff.precision.method import options_from
from lightning_eff.precision.plugin import QuantizedPrecisionMixin
from lightning_eff.runtime.finite import OnNonFinite


class DFP16Mixin(QuantizedPrecisionMixin):
    """Trains in DFP-16: inputs, weights and output gradients as int16 with one exponent for a tensor, measured from it.

    All three products of Linear, Conv1d/2d/3d, MultiheadAttention and transformers' Conv1D multiply int16 and add in
    int32, in chains so short that they cannot overflow; the chains are added in float32. Inputs are kept for backward
    as int16, half of float32. Master weights, optimizer, biases, normalisation and softmax stay the same.

    Args:
        products: ``"auto"`` (int16 units where measured faster on this machine; last bits depend on it),
            ``"native"`` int16 or ``"emulated"``: exact products, sums rounded to float32.
        exempt: name patterns (``"*.head"``) of layers to leave in high precision.
        exempt_first_last: leave the first and the last layer in high precision.
        pack_relu: let ``nn.ReLU`` modules keep one bit per element for backward; their numbers do not change.
        measure_every_n_steps: log the ``eff/dfp16/*`` figures every n optimizer steps, at the cost of a few passes over
            the tensors in those steps; 0 never.
        on_nonfinite: ``"raise"`` before a NaN or Inf gradient reaches a parameter, or ``"warn"``.

    Raises:
        ConfigurationError: an option is outside its range.

    State: ``phase`` under the class name in the checkpoint.
    Randomness: none.
    """

    info: MethodInfo = METHODS["dfp16"]
    options_class: ClassVar[type[LayerOptions]] = DFP16Options
    options: DFP16Options

    def __init__(
        self,
        *,
        products: Products = DFP16Options.products,
        exempt: Sequence[str] = DFP16Options.exempt,
        exempt_first_last: bool = DFP16Options.exempt_first_last,
        pack_relu: bool = DFP16Options.pack_relu,
        measure_every_n_steps: int = DFP16Options.measure_every_n_steps,
        on_nonfinite: OnNonFinite = DFP16Options.on_nonfinite,
    ) -> None:
        options = options_from(locals())
        super().__init__()
        self.configure_method(**options)
