"""FP8 with one scale per tensor or per row: E4M3 for inputs and weights, E5M2 for gradients.

    s = MAX / max(amax(x), 1e-12);   q = cast(clamp(x * s, -MAX, MAX));   x ~ q / s

Dynamic scaling takes amax from the tensor itself ("tensorwise") or from each of its rows ("rowwise"); delayed scaling
takes it from the steps before (:class:`DelayedScale`).

The cast rounds to nearest, ties to even. Values are clamped before it, because torch's casts differ between versions
and formats in what they do above the range (E4M3 saturates since 2.12, Inf included; E5M2 gives Inf). A tensor with NaN
or Inf gets the scale NaN, so that the damage stays visible.

References:
    Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv:2209.05433, sections 3 and 4 (formats, scaling).
    torchao.float8, recipes "tensorwise" and "rowwise" (the constants); NVIDIA Transformer Engine, DelayedScaling.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_eff.checks import Whole, check
from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.codes import Codes
from lightning_eff.methods.state import DELAYED, read_estimate

FP8_E4M3, FP8_E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST: dict[torch.dtype, float] = {FP8_E4M3: 448.0, FP8_E5M2: 57344.0}
"""Largest finite value of each format."""
HISTORY = Whole(1, 16_384, "sixteen times the default of Transformer Engine; all of it is kept and saved")
MARGIN = Whole(-8, 8)


def fp8_scale(max_abs: Tensor, dtype: torch.dtype, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Return (1 / s, s): what multiplies codes back, and what multiplies the tensor before the cast.

    Args:
        max_abs: largest magnitude of the tensor (0-d) or of each row (any shape).
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        power_of_two: round s down to a power of two; then scaling itself rounds nothing.

    Returns:
        Two float32 tensors like ``max_abs``; NaN and 0 where it is not finite.

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


def fp8_codes(
    x: Tensor,
    dtype: torch.dtype = FP8_E4M3,
    *,
    power_of_two: bool = False,
    dim: int | None = None,
    max_abs: Tensor | None = None,
) -> Codes:
    """Quantise to FP8 with one scale for the tensor, or one for each slice along a dimension.

    Args:
        x: any floating tensor; the arithmetic is float32.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        power_of_two: see :func:`fp8_scale`.
        dim: the dimension a product will sum over; every index of the others gets a scale of its own. None: one scale.
        max_abs: the largest magnitude to scale for (delayed scaling); what lies above saturates. Default: measured.

    Returns:
        Codes of ``dtype`` and the scale that multiplies them back (0-d, or shaped like ``x`` with 1 at ``dim``); all
        zero and NaN where ``x`` holds NaN or Inf.

    Raises:
        ConfigurationError: ``dtype`` is no FP8 format.

    Example:
        >>> fp8_quantize(torch.tensor([0.1, -0.5, 3.0, 10.0]), power_of_two=True)
        tensor([ 0.1016, -0.5000,  3.0000, 10.0000])
        >>> fp8_codes(torch.tensor([[448.0, 2.0], [896.0, 0.0]]), dim=1).scale.tolist()
        [[1.0], [2.0]]
    """
    x = x.detach().to(torch.float32)
    observed = largest_along(x, dim)
    # A broken tensor shows even where the scale is from the past.
    largest = observed if max_abs is None else torch.where(observed.isfinite(), max_abs, torch.nan)
    down, up = fp8_scale(largest, dtype, power_of_two=power_of_two)
    scaled = torch.where(up == 0, 0.0, x * up)
    return Codes(scaled.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), down)


def largest_along(x: Tensor, dim: int | None = None) -> Tensor:
    """Return the largest magnitude of ``x`` (0-d), or of each slice along ``dim`` (kept, of size 1); 0 if empty."""
    if dim is None:
        return x.abs().max() if x.numel() else x.new_zeros(())
    return x.abs().amax(dim, keepdim=True) if x.shape[dim] else x.sum(dim, keepdim=True)


def fp8_quantize(
    x: Tensor, dtype: torch.dtype = FP8_E4M3, *, power_of_two: bool = False, dim: int | None = None
) -> Tensor:
    """Quantise and dequantise: the values an FP8 product sees, in the dtype of ``x``.

    Args:
        x: any floating tensor.
        dtype: see :func:`fp8_codes`.
        power_of_two: see :func:`fp8_scale`.
        dim: see :func:`fp8_codes`.
    """
    return fp8_codes(x, dtype, power_of_two=power_of_two, dim=dim).dequantize(x.dtype)


class DelayedScale:
    """Delayed scaling: the scale of a step comes from the largest magnitudes of the steps before it.

        max_abs(t) = 2^margin * max(amax(t - 1), ..., amax(t - history))

    It saves the pass over the tensor for its maximum; what grows beyond it saturates. Steps without a positive finite
    maximum leave the estimate as it is.

    Args:
        history: steps looked back on, l, 1 .. 16,384.
        margin: octaves of headroom above the largest one seen, -8 .. 8.

    Attributes:
        max_abs: None before the first step, whose scale has to come from its own tensor.

    Example:
        >>> scale = DelayedScale(history=2)
        >>> [(scale.update(amax), scale.max_abs)[1] for amax in (0.0, 2.0, 8.0, 4.0, 1.0, 0.0)]
        [None, 2.0, 8.0, 8.0, 4.0, 1.0]

    References:
        Transformer Engine, recipe DelayedScaling (history 1024, margin 0, "max"). Differs: it begins with the scale
        one, where small gradients vanish.
    """

    def __init__(self, *, history: int = 1024, margin: int = 0) -> None:
        self.margin: int = check("margin", margin, MARGIN)
        self.max_abs: float | None = None
        self._seen: deque[float] = deque(maxlen=check("history", history, HISTORY))

    def update(self, observed: float) -> None:
        """Take in the largest magnitude of a step."""
        if math.isfinite(observed):
            self._seen.append(observed)
            self.max_abs = max(self._seen) * 2.0**self.margin or self.max_abs

    def state_dict(self) -> dict[str, Any]:
        """Return the history and the estimate."""
        return {"history": list(self._seen), "max_abs": self.max_abs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`; of a longer history the newest values stay.

        Raises:
            CheckpointError: it is no such state; nothing is changed.
        """
        found = read_estimate(DELAYED, state, of="DelayedScale")
        self._seen.clear()
        self._seen.extend(found["history"])
        self.max_abs = found["max_abs"]
