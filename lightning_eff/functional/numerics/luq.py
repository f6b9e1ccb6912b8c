"""LUQ, logarithmic unbiased quantisation: the FP4 quantiser of neural gradients.

A gradient x is stored as sign and one of L magnitudes alpha * 2^k, k = 0..L-1, or zero:

    alpha = max|x| * 2^-(L-1)
    |x| < alpha                       ->  alpha with probability |x| / alpha, else 0       (stochastic underflow)
    2^n alpha <= |x| < 2^(n+1) alpha  ->  2^(n+1) alpha with probability (|x| - 2^n alpha) / (2^n alpha), else 2^n alpha

Nothing exceeds the largest level, so nothing is clipped and E[Q(x)] = x everywhere; the variance is (x - l)(u - x)
between the two neighbouring levels l and u. In units of alpha every level is an integer power of two, exact in int8
for L = 7: a product of these codes with INT4 codes is an exact integer product.

``levels=7`` (default) is what four bits can hold: sign, 7 magnitudes, zero. ``levels=8`` is what the authors' code
does (alpha = max / 128): 17 values, one more than four bits hold.

References:
    Chmiel, Banner, Hoffer, Ben-Yaacov, Soudry, Accurate Neural Training with 4-bit Matrix Multiplications at Standard
    Formats, ICLR 2023, arXiv:2112.10769: section 4 (LUQ), 4.1 (in-hindsight maximum), SMP and FNT.
Differs: max|x| instead of the signed maximum of the published code; edge cases (zero, subnormal, non-finite tensors).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_eff.checks import Choice, Real, Whole, check
from lightning_eff.functional.codes import TINY, Codes
from lightning_eff.functional.random import draw_seed, uniform
from lightning_eff.methods.state import HINDSIGHT, read_estimate

GradientRounding = Literal["luq", "no_underflow", "no_log_rounding", "nearest"]
GRADIENT_ROUNDINGS: tuple[str, ...] = get_args(GradientRounding)
"""``"luq"``, and the ablations: underflow to zero, log rounding to nearest, both to nearest."""
LEVELS, ROUNDING, MOMENTUM = Whole(2, 8), Choice(*GRADIENT_ROUNDINGS), Real(0, 1, below=True)
SAMPLES = Whole(1, 64, "each costs a pass and a byte per element of a gradient, and the paper uses 2")
"""The variance falls as 1 / samples; beyond 64 that of the roundings to INT4 is all there is."""


def luq_scale(max_abs: Tensor, *, levels: int = 7, power_of_two: bool = False) -> Tensor:
    """Return alpha, the smallest magnitude of the format.

    Args:
        max_abs: 0-d, largest magnitude (or its in-hindsight estimate).
        levels: number of magnitudes L, 2..8.
        power_of_two: round alpha up to a power of two, so that the top level still reaches the maximum (appendix of
            the paper; the direction of rounding is ours, unverified there).

    Returns:
        0-d float32, at least the smallest normal number, NaN when ``max_abs`` is not finite.

    Raises:
        ConfigurationError: ``levels`` out of range.
    """
    levels = check("levels", levels, LEVELS)
    alpha = (max_abs.to(torch.float32) * 2.0 ** (1 - levels)).clamp(min=TINY)
    if power_of_two:
        mantissa, exponent = torch.frexp(alpha)
        alpha = torch.ldexp(torch.ones_like(alpha), torch.where(mantissa == 0.5, exponent - 1, exponent))
    return torch.where(max_abs.isfinite(), alpha, torch.nan)


def _inverse(alpha: Tensor, max_abs: Tensor, top: float) -> Tensor:
    """1 / alpha, nudged so that the maximum itself maps to the top level and never below it."""
    inverse = 1.0 / alpha
    short = (max_abs >= alpha * top) & (max_abs * inverse < top)
    return torch.where(short, torch.nextafter(inverse, torch.full_like(inverse, torch.inf)), inverse)


def luq_codes(
    x: Tensor,
    *,
    levels: int = 7,
    max_abs: Tensor | float | None = None,
    power_of_two: bool = False,
    rounding: GradientRounding = "luq",
    seed: int | None = None,
) -> Codes:
    """Quantise a neural gradient to integer codes 0, ±1, ±2, ±4 ... ±2^(levels-1) in units of alpha.

    Args:
        x: any floating tensor; the arithmetic is float32.
        levels: number of magnitudes; 7 is strict 4-bit.
        max_abs: largest magnitude, or its in-hindsight estimate: larger values saturate. Default: measured.
        power_of_two: see :func:`luq_scale`.
        rounding: ``"luq"``, or a biased ablation of :data:`GRADIENT_ROUNDINGS`.
        seed: 64-bit seed of the rounding; default: one draw from torch's global generator.

    Returns:
        Codes of the shape of ``x`` (int8; int16 for ``levels=8``, whose top code is 128) and alpha. All codes are zero
        and alpha is NaN when the maximum is not finite: the result of any product with them is NaN, not a small lie.

    Raises:
        ConfigurationError: ``levels`` or ``rounding`` is not allowed.

    Example:
        >>> codes, alpha = luq_codes(torch.tensor([64.0, -8.0, 0.0]))
        >>> codes.tolist(), alpha.item()
        ([64, -8, 0], 1.0)
    """
    rounding = check("rounding", rounding, ROUNDING)
    x = x.detach().to(torch.float32)
    if max_abs is None:
        max_abs = x.abs().max() if x.numel() else x.new_zeros(())
    max_abs = torch.as_tensor(max_abs, dtype=torch.float32, device=x.device)
    alpha = luq_scale(max_abs, levels=levels, power_of_two=power_of_two)
    top = 2.0 ** (levels - 1)
    y = torch.nan_to_num(x.abs() * _inverse(alpha, max_abs, top), nan=0.0).clamp(max=top)
    seed = draw_seed() if seed is None else seed
    u = uniform(x.numel(), seed, device=x.device).view(x.shape)
    codes = torch.copysign(round_to_powers(y, u, rounding), x)
    return Codes(codes.to(torch.int8 if levels < 8 else torch.int16), alpha)


def round_to_powers(y: Tensor, u: Tensor, rounding: GradientRounding = "luq") -> Tensor:
    """Round ``y >= 0`` to 0, 1, 2, 4, ...: up iff ``u < (y - lower) / (upper - lower)``.

    Args:
        y: float32, magnitudes in units of alpha.
        u: uniform in [0, 1), shape of ``y``.
        rounding: ablations replace ``u`` by one half below alpha and/or above it.
    """
    lower = (y.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2 y): the exponent field alone
    lower = torch.where(y < 1, 0.0, lower)
    step = torch.where(y < 1, 1.0, lower)
    half = torch.full_like(u, 0.5)
    if rounding in ("no_underflow", "nearest"):
        u = torch.where(y < 1, half, u)
    if rounding in ("no_log_rounding", "nearest"):
        u = torch.where(y < 1, u, half)
    return lower + step * (u < (y - lower) / step)


def luq_quantize(
    x: Tensor,
    *,
    levels: int = 7,
    max_abs: Tensor | float | None = None,
    power_of_two: bool = False,
    seed: int | None = None,
) -> Tensor:
    """Quantise and dequantise: an unbiased FP4 copy of a neural gradient, in the dtype of ``x``.

    Args:
        x: any floating tensor.
        levels: number of magnitudes; 7 is strict 4-bit.
        max_abs: see :func:`luq_codes`.
        power_of_two: see :func:`luq_scale`.
        seed: see :func:`luq_codes`.

    Returns:
        Tensor of the shape and dtype of ``x``; all NaN when ``x`` holds NaN or Inf.

    Example:
        >>> x = torch.tensor([1.0, -0.3, 0.0])
        >>> sum(luq_quantize(x, seed=s) for s in range(4000)).div(4000).sub(x).abs().max().item() < 0.02
        True
    """
    return luq_codes(x, levels=levels, max_abs=max_abs, power_of_two=power_of_two, seed=seed).dequantize(x.dtype)


def smp_quantize(x: Tensor, *, samples: int, levels: int = 7, seed: int | None = None) -> Tensor:
    """Return the mean of N independent LUQ samples (SMP-N); same mean, 1/N of the variance.

    The paper uses it for the weight gradient alone (section 4.2), N = 2.

    Args:
        x: any floating tensor.
        samples: N, 1 .. 64.
        levels: number of magnitudes.
        seed: seed of the first sample; sample ``i`` uses ``seed + i``.

    Raises:
        ConfigurationError: ``samples`` is not in 1 .. 64.
    """
    samples = check("samples", samples, SAMPLES)
    seed = draw_seed() if seed is None else seed
    return torch.stack([luq_quantize(x, levels=levels, seed=seed + i) for i in range(samples)]).mean(0)


class HindsightMax:
    """In-hindsight maximum for the next step: ``(1 - momentum) * observed + momentum * previous``.

    It replaces the pass over the tensor for its maximum; values above the estimate saturate (a small bias).

    Args:
        momentum: eta, 0 and more, below 1; 0.1 is from memory, unverified in the paper's text.

    Example:
        >>> estimate = HindsightMax(momentum=0.25)
        >>> estimate.update(4.0), estimate.update(8.0), estimate.value
        (None, None, 7.0)
    """

    def __init__(self, momentum: float = 0.1) -> None:
        self.momentum: float = check("momentum", momentum, MOMENTUM)
        self.value = math.nan

    def update(self, observed: float) -> None:
        """Take in the true maximum of a step; a broken step must not poison the estimate for good."""
        if math.isfinite(observed):
            first = math.isnan(self.value)
            self.value = observed if first else (1 - self.momentum) * observed + self.momentum * self.value

    def state_dict(self) -> dict[str, Any]:
        """Return the estimate, NaN before the first step."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`; a CheckpointError, and nothing changed, if it is none."""
        self.value = read_estimate(HINDSIGHT, state, of="HindsightMax")["value"]


def fnt_learning_rate(step: int, *, total: int, start: float, base: float) -> float:
    """Return the triangular learning rate of fine-tuning: up from ``start`` to ``base``, then down to zero.

    Args:
        step: 0..total.
        total: steps of the phase, T.
        start: last learning rate of the 4-bit phase, LR_T.
        base: peak, LR_base.

    References:
        Chmiel et al. 2023, FNT. The printed formula lost its ``t``; this is the reading consistent with "linear up,
        then down".

    Example:
        >>> [fnt_learning_rate(t, total=4, start=0.0, base=1.0) for t in range(5)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    half = total / 2
    return start + (base - start) * step / half if step <= half else base * (total - step) / half
