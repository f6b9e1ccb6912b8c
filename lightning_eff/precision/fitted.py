"""``precision="fp8-fit" | "fp6-fit"``: gradients in the float format that suits each layer.

References:
    Chmiel, Ben-Uri, Shkolnik, Hoffer, Banner, Soudry, Neural gradients are near-lognormal: improved quantized and
    sparse training, ICLR 2021, arXiv:2006.08173, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from rich.table import Table

from lightning_eff.functional.numerics.lognormal import FittedFormat
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.precision.formats.base import LayerOptions
from lightning_eff.precision.formats.fitted import FittedOptions, FittedScale
from lightning_eff.precision.method import options_from
from lightning_eff.precision.plugin import QuantizedPrecisionMixin
from lightning_eff.runtime.finite import OnNonFinite


class FittedMixin(QuantizedPrecisionMixin):
    """Trains in 8 or 6 bits, each layer's gradients in a format chosen from the spread of its own gradients.

    The magnitudes of a layer's output gradient are close to lognormal; their deviation decides how many of the bits are
    best spent on the exponent. Inputs and weights are E4M3 (8 bits) or E2M3 (6 bits) with one dynamic scale per tensor.
    Products of Linear, Conv1d/2d/3d, MultiheadAttention and transformers' Conv1D multiply these values as bfloat16,
    which holds them exactly, with float32 sums. Inputs are kept for backward as one byte per element.

    Args:
        bits: 8 or 6.
        refit_every_n_steps: optimizer steps between two fits; within the first n steps also at 1, 2, 4, 8, ...
        scale: where the format is placed. ``"max"``: its top at the tensor's largest magnitude. ``"mean"``: as
            published, three octaves above the mean of log2|g| at the last fit; larger values saturate.
        gradient_rounding: ``"nearest"`` (ties to even) or ``"stochastic"``, unbiased.
        exempt: name patterns (``"*.head"``) of layers to leave in high precision.
        exempt_first_last: leave the first and the last layer in high precision (an embedding counts as the first).
        pack_relu: let ``nn.ReLU`` modules keep one bit per element for backward; their numbers do not change.
        measure_every_n_steps: log the ``eff/fp8-fit/*`` figures every n optimizer steps, at the cost of a few passes
            over the tensors in those steps; 0 never.
        on_nonfinite: ``"raise"`` before a NaN or Inf gradient reaches a parameter, or ``"warn"``.

    Raises:
        ConfigurationError: an option is outside its range, or contradicts the string the method was asked for by.

    State: ``phase``, ``memory`` (each layer's format), and for stochastic rounding ``seed`` and ``calls``, under the
    class name in the checkpoint.
    Randomness: with ``gradient_rounding="stochastic"`` a hash of (``torch.initial_seed()``, a counter, the rank);
    torch's generators are not touched.
    """

    info: MethodInfo = METHODS["fp8-fit"]
    options_class: ClassVar[type[LayerOptions]] = FittedOptions
    options: FittedOptions

    def __init__(
        self,
        *,
        bits: Literal[8, 6] = FittedOptions.bits,
        refit_every_n_steps: int = FittedOptions.refit_every_n_steps,
        scale: FittedScale = FittedOptions.scale,
        gradient_rounding: Literal["nearest", "stochastic"] = FittedOptions.gradient_rounding,
        exempt: Sequence[str] = FittedOptions.exempt,
        exempt_first_last: bool = FittedOptions.exempt_first_last,
        pack_relu: bool = FittedOptions.pack_relu,
        measure_every_n_steps: int = FittedOptions.measure_every_n_steps,
        on_nonfinite: OnNonFinite = FittedOptions.on_nonfinite,
    ) -> None:
        options = options_from(locals())
        super().__init__()
        self.configure_method(**options)

    def chosen(self) -> dict[str, str]:
        """Return layer name -> the split its gradients have now, ``"1-4-3"`` for instance."""
        formats = {
            name: state.histories["grad"].estimate_as(FittedFormat).format for name, state in self.states().items()
        }
        return {name: f"1-{fmt.exponent_bits}-{fmt.mantissa_bits}" for name, fmt in formats.items()}

    def _verdict(self) -> list[str | Table]:
        """Return the formats the layers ended with besides."""
        table = Table(title=f"{self.info.name}: gradient formats at the end", title_justify="left")
        for column in ("layer", "sign-exponent-mantissa"):
            table.add_column(column, overflow="fold")
        for name, split in self.chosen().items():
            table.add_row(name or "(model)", split)
        return [*super()._verdict(), table]
