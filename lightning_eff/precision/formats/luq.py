"""The 4-bit formats of LUQ as layers use them: INT4 inputs and weights (SAWB), FP4 gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_eff.checks import Maybe, Rule, YesNo
from lightning_eff.errors import ConfigurationError
from lightning_eff.functional import HindsightMax, saturated_share, zero_share
from lightning_eff.functional.codes import Codes
from lightning_eff.functional.numerics.luq import LEVELS, MOMENTUM, ROUNDING, SAMPLES, GradientRounding
from lightning_eff.functional.numerics.sawb import UNSIGNED, Unsigned
from lightning_eff.kernels.capability import native_int8
from lightning_eff.kernels.products import scratch
from lightning_eff.kernels.quantize import largest_magnitude, luq_codes, sawb_encode, unpack_int4
from lightning_eff.precision.formats.base import Format, GradCodes, LayerOptions, LayerView, SavedInput, WeightCodes
from lightning_eff.precision.formats.history import History


def _buffer(name: str, numel: int, device: torch.device) -> Tensor | None:
    return scratch(name, numel, torch.int8) if device.type == "cpu" else None


@dataclass(frozen=True, kw_only=True)
class LUQOptions(LayerOptions):
    """Holds the options of ``luq4``; :class:`lightning_eff.precision.luq.LUQMixin` says what they mean.

    Raises:
        ConfigurationError: an option is outside its range.
    """

    levels: int = 7
    samples: int = 1
    unsigned: Unsigned = "mirror5"
    hindsight: float | None = None
    power_of_two: bool = False
    gradient_rounding: GradientRounding = "luq"

    RULES: ClassVar[Mapping[str, Rule]] = {
        **LayerOptions.RULES,
        "levels": LEVELS,
        "samples": SAMPLES,
        "unsigned": UNSIGNED,
        "hindsight": Maybe(MOMENTUM),
        "power_of_two": YesNo(),
        "gradient_rounding": ROUNDING,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.products == "native" and self.levels > 7:
            raise ConfigurationError("levels=8 has the code 128, beyond int8: use products='auto' or levels=7.")

    def format(self) -> Format:
        """Return INT4 with FP4 gradients."""
        return LUQFormat(self)


@dataclass(frozen=True)
class LUQFormat(Format):
    """Encodes inputs and weights in INT4, gradients in FP4; a :class:`~lightning_eff.precision.formats.base.Format`."""

    options: LUQOptions

    units = ("native int8", "emulated in float32")
    operands = "INT4 x INT4 (SAWB), FP4 (LUQ)"
    nibbles = 1

    def native(self, device: torch.device) -> bool:
        """Return whether products run on int8 units."""
        if self.options.levels > 7 or self.options.products == "emulated":
            return False
        return self.options.products == "native" or native_int8(device)

    def histories(self) -> dict[str, History]:
        """Return that of the gradient's in-hindsight maximum, if it is used."""
        momentum = self.options.hindsight
        return {} if momentum is None else {"grad": History(HindsightMax(momentum))}

    def saved_scales(self, columns: int | None) -> int:
        """Return 2: the scale, and whether the codes are unsigned."""
        return 2

    def encode_weight(self, weight: Tensor, layer: LayerView) -> WeightCodes:
        """Encode a weight in INT4."""
        codes = sawb_encode(weight)[0]
        return WeightCodes(codes, codes)

    def encode_input(self, x: Tensor, layer: LayerView, *, save: bool) -> tuple[Codes, SavedInput | None]:
        """Encode an input in INT4; its codes are kept two to a byte, with (scale, 1 if unsigned)."""
        buffer = _buffer("input", x.numel(), x.device)
        codes, packed, is_unsigned = sawb_encode(x, unsigned=self.options.unsigned, pack=save, out=buffer)
        if packed is None:
            return codes, None
        flag = torch.full((), float(is_unsigned), dtype=torch.float32, device=x.device)
        return codes, SavedInput(packed, torch.stack([codes.scale, flag]))

    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        """Unpack the INT4 codes."""
        numel = math.prod(shape)
        buffer = _buffer("input", numel, saved.packed.device)
        codes = unpack_int4(saved.packed, numel, unsigned=bool(saved.scale[1]), out=buffer)
        return Codes(codes.view(tuple(shape)), saved.scale[0])

    def encode_grad(self, grad: Tensor, layer: LayerView) -> GradCodes:
        """Encode a gradient in FP4, ``samples`` times; in hindsight its maximum is the estimate of the steps before."""
        history = layer.histories.get("grad")
        predicted = math.nan if history is None else history.estimate_as(HindsightMax).value
        estimated = not math.isnan(predicted)
        largest = predicted if estimated else largest_magnitude(grad)
        observed = largest if isinstance(largest, Tensor) else torch.empty((), dtype=torch.float32, device=grad.device)
        samples = [
            luq_codes(
                grad,
                levels=self.options.levels,
                max_abs=largest,
                power_of_two=self.options.power_of_two,
                rounding=self.options.gradient_rounding,
                seed=layer.seeds.next(),
                out=_buffer(f"grad{i}", grad.numel(), grad.device),
                observed=observed if estimated and i == 0 else None,
            )
            for i in range(self.options.samples)
        ]
        if history is not None:
            history.observe(observed)
            if estimated:  # NaN must not pass as the top code
                samples = [Codes(s.codes, torch.where(observed.isfinite(), s.scale, torch.nan)) for s in samples]
        return GradCodes(samples[0], samples)

    def grad_figures(self, grad: Tensor, codes: Codes, layer: LayerView) -> dict[str, Tensor]:
        """Return the shares of zero and of saturated codes."""
        top = 2 ** (self.options.levels - 1)
        return {"grad_zeros": zero_share(codes.codes), "grad_saturated": saturated_share(codes.codes, top)}
