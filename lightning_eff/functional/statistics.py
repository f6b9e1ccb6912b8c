"""Figures that tell whether a quantiser is in its working range."""

from __future__ import annotations

import torch
from torch import Tensor


def sqnr_db(x: Tensor, quantized: Tensor) -> Tensor:
    """Return the SQNR in dB, ``10 log10(sum x^2 / sum (x - q)^2)``, 0-d float32; Inf without quantisation noise."""
    x, quantized = x.detach().to(torch.float32), quantized.detach().to(torch.float32)
    return 10 * torch.log10(x.square().sum() / (x - quantized).square().sum())


def zero_share(codes: Tensor) -> Tensor:
    """Return the share of codes that are zero, 0..1, 0-d float32."""
    return (codes == 0).to(torch.float32).mean()


def saturated_share(codes: Tensor, top: float) -> Tensor:
    """Return the share of codes at the largest magnitude ``top``, 0..1, 0-d float32."""
    return (codes.abs() >= top).to(torch.float32).mean()
