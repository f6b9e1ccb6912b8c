"""SAWB, statistics-aware weight binning: the INT4 quantiser of weights and activations.

    clip = c1 * sqrt(mean(x^2)) + c2 * mean(|x|)
    x_q  = clamp(round(x / step), lowest code, highest code) * step

The coefficients put ``clip`` near the range of least mean squared error for bell-shaped data without a search.
Signed tensors use 15 levels, codes -7..7, ``step = clip / 7``. Tensors without negative elements (after ReLU) may use
codes 0..15:

* ``"mirror5"``: statistics of the positive elements as one half of a symmetric distribution, the five-bit
  coefficients as top of the range, ``step = clip / 15``. Ours; wastes no level on the zeros.
* ``"reference"``: statistics of all elements with zeros, ``step = 2 clip / 15``, as the authors of LUQ published it.

Data flatter than uniform, mean(|x|) > 0.87 rms, lie outside the family the coefficients were fitted to: the formula
falls steeply there, to 5 dB SQNR for sigmoid(N(0, 1)) and to 0 dB for constant data. 4-bit tensors then use
``clip = min(max|x|, 2 rms)``, except in ``"reference"``.

Rounding is to the nearest code, ties to even. Gradients pass straight through (no clipping mask), as in LUQ.

References:
    Choi et al., Bridging the Accuracy Gap for 2-bit Quantized Neural Networks, 2018, arXiv:1807.06964 (SAWB).
    Chmiel et al., ICLR 2023, arXiv:2112.10769, section 4 (use in LUQ).
Differs: 15 symmetric levels (IBM's "code 403" coefficients) instead of 16, so that zero is a code and a code fits
    four signed bits; ``"mirror5"``; the range of flat data.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_eff.checks import Choice, check
from lightning_eff.functional.codes import TINY, Codes

Unsigned = Literal[False, "mirror5", "reference"]
UNSIGNED = Choice(*get_args(Unsigned))

COEFFICIENTS: dict[str, dict[int, tuple[float, float]]] = {
    "signed": {2: (3.12, -2.064), 3: (7.509, -6.892), 4: (12.035, -12.03)},
    "mirror5": {4: (17.74, -18.64)},
    "reference": {4: (12.1, -12.2)},
}
"""(c1, c2) by kind and bits; see the table of published sets on the method card."""
FLAT = 0.87
"""Largest mean(|x|) / rms the 4-bit coefficients are for: just above the 0.866 of uniform data."""


def _check(bits: int, unsigned: Unsigned) -> tuple[float, float]:
    kind = check("unsigned", unsigned, UNSIGNED) or "signed"
    bits = check("bits", bits, Choice(*sorted(COEFFICIENTS[kind])))  # others have no coefficients
    return COEFFICIENTS[kind][bits]


def _levels(bits: int, unsigned: Unsigned) -> tuple[int, int]:
    return (0, 2**bits - 1) if unsigned else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


def sawb_scale(x: Tensor, *, bits: int = 4, unsigned: Unsigned = False) -> Tensor:
    """Return the step between two codes.

    Args:
        x: any floating tensor; statistics are taken over all of it.
        bits: 2, 3 or 4 (4 only, when ``unsigned``).
        unsigned: ``False``, ``"mirror5"`` or ``"reference"``; the latter two expect no negative element.

    Returns:
        0-d float32, at least the smallest normal number; NaN when ``x`` holds NaN or Inf. Where the formula gives no
        positive finite range (nearly binary data, squares beyond float32) the largest magnitude is used.

    Raises:
        ConfigurationError: unknown ``bits`` or ``unsigned``.
    """
    c1, c2 = _check(bits, unsigned)
    _, high = _levels(bits, unsigned)
    x = x.detach().reshape(-1).to(torch.float32)
    if x.numel() == 0:
        return torch.full((), TINY, dtype=torch.float32, device=x.device)
    kept = x[x > 0] if unsigned == "mirror5" else x
    largest, count = x.abs().max(), max(kept.numel(), 1)
    rms = (kept.square().sum(dtype=torch.float64) / count).sqrt()
    mean = kept.abs().sum(dtype=torch.float64) / count
    clip = (c1 * rms + c2 * mean).to(torch.float32)
    clip = torch.where((clip > 0) & clip.isfinite(), clip, largest * (0.5 if unsigned == "reference" else 1))
    if bits == 4 and unsigned != "reference":
        wide = (2 * torch.maximum(rms, mean)).to(torch.float32)  # rms < mean only where tiny squares underflow
        clip = torch.where(mean > FLAT * rms, torch.minimum(largest, wide), clip)
    step = clip / (high / 2 if unsigned == "reference" else high)
    return torch.where(largest.isfinite(), step.clamp(min=TINY), torch.nan)


def sawb_codes(x: Tensor, *, bits: int = 4, unsigned: Unsigned = False, scale: Tensor | None = None) -> Codes:
    """Quantise to integer codes, ``round(x / step)`` clamped to the code range.

    Args:
        x: any floating tensor; the arithmetic is float32.
        bits: bits of a code.
        unsigned: see the module; codes 0..15 instead of -7..7.
        scale: the step, 0-d float32, if known; else :func:`sawb_scale`.

    Returns:
        int8 codes of the shape of ``x`` and the scale. All codes are zero when the scale is NaN.

    Raises:
        ConfigurationError: unknown ``bits`` or ``unsigned``.

    Example:
        >>> codes, scale = sawb_codes(torch.tensor([-1.0, 0.0, 1.0]))
        >>> codes.tolist()
        [-4, 0, 4]
    """
    _check(bits, unsigned)
    low, high = _levels(bits, unsigned)
    scale = sawb_scale(x, bits=bits, unsigned=unsigned) if scale is None else scale
    y = x.detach().to(torch.float32) * (1.0 / scale)
    return Codes(torch.nan_to_num(y).clamp(low, high).round().to(torch.int8), scale)


def sawb_quantize(x: Tensor, *, bits: int = 4, unsigned: Unsigned = False) -> Tensor:
    """Quantise and dequantise: the values an INT4 product sees, in the dtype of ``x``.

    Args:
        x: any floating tensor.
        bits: bits of a code.
        unsigned: see the module.

    Returns:
        Tensor of the shape and dtype of ``x`` on at most ``2**bits`` levels; all NaN when ``x`` holds NaN or Inf.
    """
    return sawb_codes(x, bits=bits, unsigned=unsigned).dequantize(x.dtype)
