"""``precision="luq4"``: 4-bit training by logarithmic unbiased quantisation.

References:
    Chmiel, Banner, Hoffer, Ben-Yaacov, Soudry, Accurate Neural Training with 4-bit Matrix Multiplications at Standard
    Formats, ICLR 2023, arXiv:2112.10769.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lightning_eff.functional.numerics.luq import GradientRounding
from lightning_eff.functional.numerics.sawb import Unsigned
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.precision.formats.base import LayerOptions, Products
from lightning_eff.precision.formats.luq import LUQOptions
from lightning_eff.precision.method import options_from
from lightning_eff.precision.plugin import QuantizedPrecisionMixin
from lightning_eff.runtime.finite import OnNonFinite


class LUQMixin(QuantizedPrecisionMixin):
    """Trains in 4 bits: INT4 weights and activations (SAWB), logarithmic unbiased FP4 gradients (LUQ).

    All three products of Linear, Conv1d/2d/3d, MultiheadAttention and transformers' Conv1D run on 4-bit operands: as
    exact int8 products where the machine has them, with the same numbers in float32 elsewhere. Inputs are kept for
    backward as packed INT4, an eighth of float32. Master weights, optimizer, normalisation and softmax stay the same.

    Args:
        levels: magnitudes of the gradient format; 7 is what four bits hold, 8 is the published code (never native).
        samples: N of SMP-N, 1 to 64, independent gradient samples averaged in the weight gradient; 2 in the paper.
        unsigned: codes 0..15 for inputs without negative elements (after ReLU): ``"mirror5"``, ``"reference"`` or
            ``False``.
        hindsight: momentum of the in-hindsight maximum, 0 <= hindsight < 1; ``None`` measures the maximum each time.
        power_of_two: round the gradient's scale up to a power of two.
        gradient_rounding: ``"luq"``; ``"no_underflow"``, ``"no_log_rounding"`` and ``"nearest"`` are biased ablations.
        exempt: name patterns (``"*.head"``) of layers to leave in high precision.
        exempt_first_last: leave the first and the last layer in high precision (an embedding counts as the first).
        pack_relu: let ``nn.ReLU`` modules keep one bit per element for backward; their numbers do not change.
        products: ``"auto"`` (measured once per machine), ``"native"`` int8 or ``"emulated"``.
        measure_every_n_steps: log the ``eff/luq4/*`` figures every n optimizer steps, at the cost of a few passes over
            the tensors in those steps; 0 never.
        on_nonfinite: ``"raise"`` before a NaN or Inf gradient reaches a parameter, or ``"warn"``.

    Raises:
        ConfigurationError: an option is outside its range.

    State: ``seed``, ``calls``, ``phase``, ``memory`` under the class name in the checkpoint.
    Randomness: gradient rounding hashes (``torch.initial_seed()``, a counter, the rank); torch's generators are not
    touched.
    """

    info: MethodInfo = METHODS["luq4"]
    options_class: ClassVar[type[LayerOptions]] = LUQOptions
    options: LUQOptions

    def __init__(
        self,
        *,
        levels: int = LUQOptions.levels,
        samples: int = LUQOptions.samples,
        unsigned: Unsigned = LUQOptions.unsigned,
        hindsight: float | None = LUQOptions.hindsight,
        power_of_two: bool = LUQOptions.power_of_two,
        gradient_rounding: GradientRounding = LUQOptions.gradient_rounding,
        exempt: Sequence[str] = LUQOptions.exempt,
        exempt_first_last: bool = LUQOptions.exempt_first_last,
        pack_relu: bool = LUQOptions.pack_relu,
        products: Products = LUQOptions.products,
        measure_every_n_steps: int = LUQOptions.measure_every_n_steps,
        on_nonfinite: OnNonFinite = LUQOptions.on_nonfinite,
    ) -> None:
        options = options_from(locals())
        super().__init__()
        self.configure_method(**options)
