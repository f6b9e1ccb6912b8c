"""``precision="bf16-emulated"``: the bfloat16 study's recipe on any hardware.

References:
    Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training, 2019, arXiv:1905.12322, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.precision.formats.base import LayerOptions
from lightning_eff.precision.formats.bf16 import BF16EmulatedOptions
from lightning_eff.precision.method import options_from
from lightning_eff.precision.plugin import QuantizedPrecisionMixin
from lightning_eff.runtime.finite import OnNonFinite


class BF16EmulatedMixin(QuantizedPrecisionMixin):
    """Trains in bfloat16 as the study defines it: bfloat16 operands and results of every product, float32 the rest.

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
    options_class: ClassVar[type[LayerOptions]] = BF16EmulatedOptions
    options: BF16EmulatedOptions

    def __init__(
        self,
        *,
        exempt: Sequence[str] = BF16EmulatedOptions.exempt,
        exempt_first_last: bool = BF16EmulatedOptions.exempt_first_last,
        pack_relu: bool = BF16EmulatedOptions.pack_relu,
        measure_every_n_steps: int = BF16EmulatedOptions.measure_every_n_steps,
        on_nonfinite: OnNonFinite = BF16EmulatedOptions.on_nonfinite,
    ) -> None:
        options = options_from(locals())
        super().__init__()
        self.configure_method(**options)
