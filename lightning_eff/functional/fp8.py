"""FP8 with one dynamic scale per tensor: E4M3 for inputs and weights, E5M2 for gradients.

    s = MAX / max(amax(x), 1e-12);   q = cast(clamp(x * s, -MAX, MAX));   x ~ q / s

The cast rounds to nearest, ties to even. Values are clamped before it, because torch's casts differ between versions
and formats in what they do above the range (E4M3 saturates since 2.12, Inf included; E5M2 gives Inf). A tensor with NaN
or Inf gets the scale NaN, so that the damage stays visible.

References:
    Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv:2209.05433, sections 3 and 4 (formats, scaling).
    torchao.float8, recipe "tensorwise" (the constants).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.formats import Codes

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST: dict[torch.dtype, float] = {E4M3: 448.0, E5M2: 57344.0}
"""Largest finite value of each format."""


def fp8_scale(max_abs: Tensor, dtype: torch.dtype, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Return (1 / s, s): what multiplies codes back, and what multiplies the tensor before the cast.

    Args:
        max_abs: 0-d, largest magnitude.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        power_of_two: round s down to a power of two; then scaling itself rounds nothing.

    Returns:
        Two 0-d float32 tensors; NaN and 0 when ``max_abs`` is not finite.

    Raises:
        ConfigurationError: ``dtype`` is no FP8 format.
    """
    if dtype not in LARGEST:
        raise ConfigurationError(f"dtype={dtype!r} is no FP8 format; use torch.float8_e4m3fn or torch.float8_e5m2.")
    up = (LARGEST[dtype] / max_abs.to(torch.float64).clamp(min=1e-12)).to(torch.float32)
    if power_of_two:
        up = torch.ldexp(torch.ones_like(up), torch.frexp(up).exponent - 1)
    finite = max_abs.isfinite()
    return torch.where(finite, 1 / up, torch.nan), torch.where(finite, up, 0.0)


def fp8_codes(x: Tensor, dtype: torch.dtype = E4M3, *, power_of_two: bool = False) -> Codes:
    """Quantise to FP8 with one scale for the tensor.

    Args:
        x: any floating tensor; the arithmetic is float32.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        power_of_two: see :func:`fp8_scale`.

    Returns:
        Codes of ``dtype`` and the scale that multiplies them back; all zero and NaN when ``x`` holds NaN or Inf.

    Raises:
        ConfigurationError: ``dtype`` is no FP8 format.

    Example:
        >>> fp8_quantize(torch.tensor([0.1, -0.5, 3.0, 10.0]), power_of_two=True)
        tensor([ 0.1016, -0.5000,  3.0000, 10.0000])
    """
    x = x.detach().to(torch.float32)
    max_abs = x.abs().max() if x.numel() else x.new_zeros(())
    down, up = fp8_scale(max_abs, dtype, power_of_two=power_of_two)
    scaled = torch.where(up == 0, 0.0, x * up)
    return Codes(scaled.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), down)


def fp8_quantize(x: Tensor, dtype: torch.dtype = E4M3, *, power_of_two: bool = False) -> Tensor:
    """Quantise and dequantise: the values an FP8 product sees, in the dtype of ``x``.

    Args:
        x: any floating tensor.
        dtype: see :func:`fp8_codes`.
        power_of_two: see :func:`fp8_scale`.
    """
    return fp8_codes(x, dtype, power_of_two=power_of_two).dequantize(x.dtype)
