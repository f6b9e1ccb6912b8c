"""Gradients in the float format that suits their spread, found in each layer from its own gradients.

References:
    Chmiel, Ben-Uri, Shkolnik, Hoffer, Banner, Soudry, Neural gradients are near-lognormal: improved quantized and
    sparse training, ICLR 2021, arXiv:2006.08173, sections 5 (format) and 5.2 (scale).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_eff.checks import Choice, Rule, Whole
from lightning_eff.errors import InternalError
from lightning_eff.functional import saturated_share, zero_share
from lightning_eff.functional.codes import Codes
from lightning_eff.functional.numerics.float_format import ROUNDING, FloatFormat, FloatRounding
from lightning_eff.functional.numerics.fp8 import FP8_E4M3
from lightning_eff.functional.numerics.lognormal import FittedFormat, lognormal_fit
from lightning_eff.kernels import float_format
from lightning_eff.kernels.fp8 import fp8_decode, fp8_encode
from lightning_eff.kernels.products import scratch
from lightning_eff.kernels.quantize import largest_magnitude
from lightning_eff.precision.formats.base import Format, GradCodes, LayerOptions, LayerView, SavedInput, WeightCodes
from lightning_eff.precision.formats.history import History

FittedScale = Literal["max", "mean"]
E2M3 = FloatFormat(2, 3)
"""Inputs and weights of six bits; the OCP's MXFP6 has the same elements."""


@dataclass(frozen=True, kw_only=True)
class FittedOptions(LayerOptions):
    """Holds the options of ``fp8-fit`` and ``fp6-fit``; :class:`lightning_eff.precision.fitted.FittedMixin` explains.

    Raises:
        ConfigurationError: an option is outside its range.
    """

    bits: Literal[8, 6] = 8
    refit_every_n_steps: int = 100
    scale: FittedScale = "max"
    gradient_rounding: FloatRounding = "nearest"

    RULES: ClassVar[Mapping[str, Rule]] = {
        **LayerOptions.RULES,
        "bits": Choice(8, 6),
        "refit_every_n_steps": Whole(1),
        "scale": Choice(*get_args(FittedScale)),
        "gradient_rounding": ROUNDING,
    }

    def format(self) -> Format:
        """Return a float format for each layer's gradient."""
        return FittedFormatOfLayer(self)


def _due(step: int, every: int) -> bool:
    """Return whether step ``step`` fits anew: often while gradients still change fast, then every ``every`` steps."""
    return step % every == 0 or (step < every and step & (step - 1) == 0)


def _reaching(fmt: FloatFormat, largest: float) -> FloatFormat:
    """Return ``fmt`` with the smallest values that still reach ``largest``."""
    if not 0 < largest < math.inf:
        return fmt
    return fmt.scaled(-math.floor(math.log2(fmt.max / largest)))


@dataclass(frozen=True)
class FittedFormatOfLayer(Format):
    """Encodes a layer's gradients in a float format of their own; a :class:`~.base.Format`."""

    options: FittedOptions

    units = ("native", "as bfloat16, float32 sums")

    @property
    def operands(self) -> str:
        """The formats of input, weight and gradient."""
        forward = "E4M3" if self.options.bits == 8 else "E2M3"
        return f"{forward} x {forward}, FP{self.options.bits} fitted"

    def native(self, device: torch.device) -> bool:
        """Return False: values are multiplied as bfloat16, which holds them exactly."""
        return False

    def histories(self) -> dict[str, History]:
        """Return that of the gradient's format."""
        return {"grad": History(FittedFormat(self.options.bits), numbers=2)}

    def _forward_codes(self, x: Tensor, name: str | None) -> tuple[Codes, Tensor]:
        """Encode with one scale for the tensor, as bfloat16 values and as bytes (of E4M3, which holds E2M3)."""
        out = scratch(name, x.numel(), torch.bfloat16) if name and x.device.type == "cpu" else None
        if self.options.bits == 8:
            codes, kept = fp8_encode(x, FP8_E4M3, keep=True, out=out)
        else:
            largest = largest_magnitude(x).to(torch.float32)
            scale = torch.where(largest.isfinite(), largest.clamp(min=1e-12) / E2M3.max, torch.nan)
            units = torch.where(scale.isnan(), 0.0, x.detach().to(torch.float32) / scale).contiguous()
            codes = Codes(float_format.quantize(units, E2M3, dtype=torch.bfloat16), scale)
            kept = codes.codes.to(FP8_E4M3)
        if kept is None:  # keep=True
            raise InternalError("internal error: no codes were kept")
        return codes, kept

    def encode_weight(self, weight: Tensor, layer: LayerView) -> WeightCodes:
        """Encode a weight in E4M3 or E2M3."""
        codes, _ = self._forward_codes(weight, None)
        return WeightCodes(codes, codes)

    def encode_input(self, x: Tensor, layer: LayerView, *, save: bool) -> tuple[Codes, SavedInput | None]:
        """Encode an input in E4M3 or E2M3; it is kept as bytes."""
        codes, kept = self._forward_codes(x, "input")
        if not save:
            return codes, None
        return codes, SavedInput(kept.view(torch.uint8).reshape(-1), codes.scale.reshape(1))

    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        """Return the values of the bytes."""
        kept = saved.packed.view(FP8_E4M3).view(tuple(shape))
        out = scratch("input", kept.numel(), torch.bfloat16) if kept.device.type == "cpu" else None
        return Codes(fp8_decode(kept, out=out), saved.scale[0])

    def encode_grad(self, grad: Tensor, layer: LayerView) -> GradCodes:
        """Encode a gradient in the layer's own format, in the units of the gradient: its scale is the format's bias."""
        history = layer.histories["grad"]
        fitted = history.estimate_as(FittedFormat)
        if not fitted.fitted or _due(layer.step, self.options.refit_every_n_steps):
            fit = lognormal_fit(grad)
            spread = fit.mu / math.log(2), fit.sigma_log2
            history.observe(
                torch.tensor(
                    spread if math.isfinite(fit.mu) else (math.inf, math.inf), dtype=torch.float32, device="cpu"
                )
            )
            if not fitted.fitted:  # the first step has no other to look back on
                fitted.update(*spread)
        fmt = fitted.format
        if self.options.scale == "max":
            fmt = _reaching(fmt, float(largest_magnitude(grad)))
        stochastic = self.options.gradient_rounding == "stochastic"
        values = float_format.quantize(
            grad,
            fmt,
            rounding=self.options.gradient_rounding,
            seed=layer.seeds.next() if stochastic else None,
            dtype=torch.bfloat16,
        )
        codes = Codes(values, torch.ones((), dtype=torch.float32, device=grad.device))
        return GradCodes(codes, [codes])

    def grad_figures(self, grad: Tensor, codes: Codes, layer: LayerView) -> dict[str, Tensor]:
        """Return the shares of non-zero elements that became zero, and of values at the top of the format."""
        lost = zero_share(codes.codes) - zero_share(grad)
        top = float(codes.codes.abs().max()) if codes.codes.numel() else 0.0
        return {"grad_underflow": lost, "grad_saturated": saturated_share(codes.codes, top)}
