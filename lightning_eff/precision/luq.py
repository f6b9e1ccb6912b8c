"""``precision="luq4"``: 4-bit training by logarithmic unbiased quantisation.

References:
    Chmiel, Banner, Hoffer, Ben-Yaacov, Soudry, Accurate Neural Training with 4-bit Matrix Multiplications at Standard
    Formats, ICLR 2023, arXiv:2112.10769.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning_eff.functional.numerics.luq import GradientRounding
from lightning_eff.functional.numerics.sawb import Unsigned
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.precision.formats.config import LUQConfig, OnNonFinite, Products, options_from
from lightning_eff.precision.plugin import QuantizedPrecisionMixin


class LUQMixin(QuantizedPrecisionMixin):
    """4-bit training: INT4 weights and activations (SAWB), logarithmic unbiased FP4 gradients (LUQ).

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
    products: ClassVar[tuple[str, str]] = ("native int8", "emulated in float32")
    formats: str = "INT4 x INT4 (SAWB), FP4 (LUQ)"

    def __init__(
        self,
        *,
        levels: int = 7,
        samples: int = 1,
        unsigned: Unsigned = "mirror5",
        hindsight: float | None = None,
        power_of_two: bool = False,
        gradient_rounding: GradientRounding = "luq",
        exempt: Sequence[str] = (),
        exempt_first_last: bool = True,
        pack_relu: bool = True,
        products: Products = "auto",
        measure_every_n_steps: int = 1000,
        on_nonfinite: OnNonFinite = "raise",
    ) -> None:
        options = options_from(locals())
        super().__init__()
        self._eff_init(**options)

    def _eff_init(self, **options: Any) -> None:
        """Set up after construction, or after a graft onto a plugin Lightning made."""
        self._begin(LUQConfig(**options))
