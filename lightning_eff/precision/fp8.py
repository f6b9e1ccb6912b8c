"""``precision="fp8"``: 8-bit floating point in all three products of a layer.

References:
    Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv:2209.05433.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.precision.base import QuantizedPrecisionMixin
from lightning_eff.precision.config import FP8Config, OnNonFinite


class FP8Mixin(QuantizedPrecisionMixin):
    """8-bit training: E4M3 inputs and weights, E5M2 gradients, one dynamic scale per tensor (recipe "tensorwise").

    The products of Linear, Conv1d/2d/3d, MultiheadAttention and transformers' Conv1D multiply FP8 values, accumulate
    in float32 and round the sum to bfloat16 once. The input is kept for backward as FP8, a quarter of float32. Master
    weights, optimizer, normalisation and softmax stay the same.

    Args:
        power_of_two: round scales down to powers of two, so that scaling itself rounds nothing.
        exempt: name patterns (``"*.head"``) of layers to leave in high precision.
        exempt_first_last: leave the first and the last layer in high precision (an embedding counts as the first).
        pack_relu: let ``nn.ReLU`` modules keep one bit per element for backward; their numbers do not change.
        measure_every_n_steps: log the ``eff/fp8/*`` figures every n optimizer steps, at the cost of a few passes over
            the tensors in those steps; 0 never.
        on_nonfinite: ``"raise"`` before a NaN or Inf gradient reaches a parameter, or ``"warn"``.

    Raises:
        ConfigurationError: an option is outside its range.

    State: ``phase`` under the class name in the checkpoint.
    Randomness: none.
    """

    info: ClassVar[MethodInfo] = METHODS["fp8"]
    formats: ClassVar[str] = "E4M3 x E4M3, E5M2"
    products: ClassVar[tuple[str, str]] = ("native FP8", "as bfloat16, float32 sums")

    def __init__(
        self,
        *,
        power_of_two: bool = False,
        exempt: Sequence[str] = (),
        exempt_first_last: bool = True,
        pack_relu: bool = True,
        measure_every_n_steps: int = 1000,
        on_nonfinite: OnNonFinite = "raise",
    ) -> None:
        super().__init__()
        self._eff_init(
            power_of_two=power_of_two,
            exempt=exempt,
            exempt_first_last=exempt_first_last,
            pack_relu=pack_relu,
            measure_every_n_steps=measure_every_n_steps,
            on_nonfinite=on_nonfinite,
        )

    def _eff_init(self, **options: Any) -> None:
        """Set up after construction, or after a graft onto a plugin Lightning made."""
        self._begin(FP8Config(**options))
