"""``precision="fp8" | "fp8-rowwise" | "fp8-delayed"``: 8-bit floating-point products.

References:
    Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv:2209.05433; torchao.float8, recipes "tensorwise" and
    "rowwise"; NVIDIA Transformer Engine, recipe DelayedScaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.precision.formats.base import LayerOptions, Products
from lightning_eff.precision.formats.fp8 import FP8Options, Scaling
from lightning_eff.precision.method import options_from
from lightning_eff.precision.plugin import QuantizedPrecisionMixin
from lightning_eff.runtime.finite import OnNonFinite


class FP8Mixin(QuantizedPrecisionMixin):
    """Trains in 8 bits: E4M3 inputs and weights, E5M2 gradients (rowwise: E4M3), with scales.

    The products of Linear, Conv1d/2d/3d, MultiheadAttention and transformers' Conv1D multiply FP8 values and accumulate
    in float32: on the FP8 units of GPUs that have them, as bfloat16 (which holds FP8 values exactly) elsewhere. There,
    and rowwise everywhere, sums are rounded to bfloat16 once, 56 dB below them where the FP8 operands leave 25 dB. The
    input is kept for backward as FP8, a quarter of float32. Master weights, optimizer, normalisation and softmax stay
    the same.

    Args:
        scaling: ``"tensorwise"``: one scale for a tensor, from its largest magnitude. ``"rowwise"``: in linear layers a
            scale for each row that a product sums over, everything E4M3; convolutions tensorwise. ``"delayed"``: one
            scale for a tensor, from the largest magnitudes of the steps before, one pass less.
        power_of_two: round scales down to powers of two, so that scaling itself rounds nothing. Default: for rowwise.
        history: steps delayed scaling looks back on, 1 to 16,384.
        margin: octaves of headroom of delayed scaling, -8 to 8.
        products: ``"auto"`` (FP8 units where measured faster), ``"native"`` FP8 or ``"emulated"``.
        exempt: name patterns (``"*.head"``) of layers to leave in high precision.
        exempt_first_last: leave the first and the last layer in high precision (an embedding counts as the first).
        filter_slow: leave layers in high precision that are too small to get faster; the table says which.
        pack_relu: let ``nn.ReLU`` modules keep one bit per element for backward; their numbers do not change.
        measure_every_n_steps: log the ``eff/fp8/*`` figures every n optimizer steps, at the cost of a few passes over
            the tensors in those steps; 0 never.
        on_nonfinite: ``"raise"`` before a NaN or Inf gradient reaches a parameter, or ``"warn"``.

    Raises:
        ConfigurationError: an option is outside its range, or contradicts the string the method was asked for by.

    State: ``phase`` and, for delayed scaling, ``memory`` under the class name in the checkpoint.
    Randomness: none.
    """

    info: MethodInfo = METHODS["fp8"]
    options_class: ClassVar[type[LayerOptions]] = FP8Options
    options: FP8Options

    def __init__(
        self,
        *,
        scaling: Scaling = FP8Options.scaling,
        power_of_two: bool | None = FP8Options.power_of_two,
        history: int = FP8Options.history,
        margin: int = FP8Options.margin,
        products: Products = FP8Options.products,
        exempt: Sequence[str] = FP8Options.exempt,
        exempt_first_last: bool = FP8Options.exempt_first_last,
        filter_slow: bool = FP8Options.filter_slow,
        pack_relu: bool = FP8Options.pack_relu,
        measure_every_n_steps: int = FP8Options.measure_every_n_steps,
        on_nonfinite: OnNonFinite = FP8Options.on_nonfinite,
    ) -> None:
        options = options_from(locals())
        super().__init__()
        self.configure_method(**options)
