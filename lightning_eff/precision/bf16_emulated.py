"""``precision="bf16-emulated"``: the bfloat16 study's recipe on any hardware.

References:
    Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training, 2019, arXiv:1905.12322, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.precision.formats.config import BF16EmulatedConfig, OnNonFinite, options_from
from lightning_eff.precision.plugin import QuantizedPrecisionMixin


class BF16EmulatedMixin(QuantizedPrecisionMixin):
    """bfloat16 training as the study defines it: bfloat16 operands and results of every product, float32 the rest.

    Inputs, weights and output gradients of Linear, Conv1d/2d/3d, MultiheadAttention and transformers' Conv1D are
    rounded to bfloat16 (to nearest, ties to even), multiplied with float32 sums, and outputs and input gradients are
    rounded once more. Master weights, their gradients and updates, biases, normalisation and softmax are float32. No
    loss scaling. Inputs are kept for backward as bfloat16.

    Against ``bf16-mixed``: normalisation, softmax and everything between the products is float32 here, and the same on
    machines whose autocast would choose otherwise; it is not meant to be faster.

    Args:
        exempt: name patterns (``"*.head"``) of layers to leave in high precision.
        exempt_first_last: leave the first and the last layer in high precision; the study does not.
        pack_relu: let ``nn.ReLU`` modules keep one bit per element for backward; their numbers do not change.
        measure_every_n_steps: log the ``eff/bf16-emulated/*`` figures every n optimizer steps, at the cost of a few
            passes over the tensors in those steps; 0 never.
        on_nonfinite: ``"raise"`` before a NaN or Inf gradient reaches a parameter, or ``"warn"``.

    Raises:
        ConfigurationError: an option is outside its range.

    State: ``phase`` under the class name in the checkpoint.
    Randomness: none.
    """

    info: MethodInfo = METHODS["bf16-emulated"]
    formats: str = "BF16 x BF16, BF16"
    products: ClassVar[tuple[str, str]] = ("native BF16", "BF16, float32 sums")

    def __init__(
        self,
        *,
        exempt: Sequence[str] = (),
        exempt_first_last: bool = False,
        pack_relu: bool = True,
        measure_every_n_steps: int = 1000,
        on_nonfinite: OnNonFinite = "raise",
    ) -> None:
        options = options_from(locals())
        super().__init__()
        self._eff_init(**options)

    def _eff_init(self, **options: Any) -> None:
        """Set up after construction, or after a graft onto a plugin Lightning made."""
        self._begin(BF16EmulatedConfig(**options))
