"""Neural gradients as lognormal numbers: pruning thresholds and float formats in closed form.

The non-zero elements of dL/dz (z: the output of a layer) have ln|g| close to normal with mean mu and standard
deviation sigma. Two things follow without a look at the tensor beyond mu and sigma:

* the threshold tau of *unbiased* stochastic pruning that leaves a wanted share of zeros,

      T(g) = g                                             |g| >= tau
             tau sign(g) with probability |g| / tau        |g| < tau, else 0

* the split of n bits into exponent and mantissa with the least expected relative error.

Legend: ``a = tau / e^mu`` normalised threshold, ``Phi`` the normal distribution function, ``sigma`` in natural logs,
``sigma2 = sigma / ln 2`` in octaves.

References:
    Chmiel, Ben-Uri, Shkolnik, Hoffer, Banner, Soudry, Neural gradients are near-lognormal: improved quantized and
    sparse training, ICLR 2021, arXiv:2006.08173: section 4 (pruning), section 5 (formats).
Differs: everything is evaluated in log space, so no width of distribution overflows; zeros are excluded from the fit
    of both uses (the published code counts them as 2^-126 in one); the relative error is derived anew, see
    :func:`relative_error`; a constant tensor (sigma = 0) has its own exact formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_eff.checks import Real, Whole, check
from lightning_eff.functional.numerics.float_format import FloatFormat
from lightning_eff.functional.random import draw_seed, uniform
from lightning_eff.methods.state import fitted_format, read_estimate

DEVIATION = Real(0, 1000)
"""A standard deviation of logarithms; those of all float32 numbers there are span 190."""
BITS = Whole(2, 8)
"""Of a format, with the sign."""
SHIFT = 3
"""Octaves between the middle of a fitted format and the mean of log2|g|."""
_LN2 = math.log(2.0)
_TOLERANCE = 1e-13


class LognormalFit(NamedTuple):
    """Parameters of the non-zero magnitudes of a tensor, natural logarithms.

    Attributes:
        mu: mean of ln|g|; NaN if the tensor has no non-zero element, or a NaN or Inf.
        sigma: standard deviation of ln|g|; 0 for one magnitude, NaN as ``mu`` is.
        zero_share: share of elements that are zero, 0..1.
    """

    mu: float
    sigma: float
    zero_share: float

    @property
    def sigma_log2(self) -> float:
        """Standard deviation of log2|g|, in octaves: the sigma2 of the format formulas."""
        return self.sigma / _LN2


def lognormal_fit(x: Tensor) -> LognormalFit:
    """Fit a lognormal distribution to the non-zero magnitudes of ``x``; one synchronisation with the device.

    Example:
        >>> fit = lognormal_fit(torch.tensor([0.0, 1.0, -(math.e**2), 0.0]))
        >>> round(fit.mu, 6), round(fit.sigma, 6), fit.zero_share
        (1.0, 1.0, 0.5)
    """
    magnitudes = x.detach().abs().reshape(-1)
    magnitudes = magnitudes if magnitudes.dtype == torch.float64 else magnitudes.to(torch.float32)
    nonzero = magnitudes != 0
    logs = torch.where(nonzero, magnitudes, 1.0).log()
    count = nonzero.sum()
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    mu = logs.sum(dtype=wide) / count
    spread = torch.where(nonzero, logs - mu.to(logs.dtype), 0.0)
    variance = spread.square().sum(dtype=wide) / count
    found = torch.stack([mu, variance, count.to(wide)]).tolist()
    sigma = math.sqrt(found[1]) if math.isfinite(found[1]) else math.nan
    share = 1 - found[2] / x.numel() if x.numel() else 0.0
    return LognormalFit(found[0] if math.isfinite(found[0]) else math.nan, sigma, share)


def _log_phi(z: float) -> float:
    """Logarithm of the normal distribution function, exact far into the tail."""
    return float(torch.special.log_ndtr(torch.tensor(z, dtype=torch.float64, device="cpu")))


def _phi(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


def _deviation(sigma: float) -> float:
    return float(check("sigma", sigma, DEVIATION))


def sparsity_of(a: float, sigma: float) -> float:
    """Return the expected share of zeros after pruning at the normalised threshold ``a`` (section 4).

        S(a) = Phi(ln a / sigma) - e^(sigma^2/2) / a * Phi((ln a - sigma^2) / sigma)

    Args:
        a: tau / e^mu, 0 or more.
        sigma: standard deviation of ln|g|; 0 means one magnitude, S = 1 - 1/a above it.

    Example:
        >>> round(sparsity_of(10.687, 1.0), 4)
        0.85
    """
    sigma = _deviation(sigma)
    if a <= 0:
        return 0.0
    if sigma == 0:
        return max(0.0, 1 - 1 / a)
    t = math.log(a)
    kept = math.exp(min(sigma**2 / 2 - t + _log_phi((t - sigma**2) / sigma), 0.0))
    return min(max(_phi(t / sigma) - kept, 0.0), 1.0)


def threshold_for(sparsity: float, sigma: float) -> float:
    """Find the normalised threshold ``a`` with ``sparsity_of(a, sigma) = sparsity``, by bisection; 0 for no sparsity.

    Args:
        sparsity: wanted share of zeros among the non-zero elements, below 1; 0 and less need no pruning.
        sigma: standard deviation of ln|g|.

    Raises:
        ConfigurationError: ``sparsity`` is 1 or more, or ``sigma`` is negative or not finite.

    Example:
        >>> round(threshold_for(0.9, 2.0), 3)
        47.657
    """
    sigma = _deviation(sigma)
    sparsity = check("sparsity", sparsity, Real(high=1, below=True))  # unbiased pruning leaves some
    if sparsity <= 0:
        return 0.0
    if sigma == 0:
        return 1 / (1 - sparsity)
    low, high = -9.0 - 9 * sigma, 20.0
    while sparsity_of(math.exp(high), sigma) < sparsity and high < 600:
        high *= 1.5
    while high - low > _TOLERANCE * max(1.0, abs(high)):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if sparsity_of(math.exp(middle), sigma) < sparsity else (low, middle)
    return math.exp(high)


def remaining_sparsity(sparsity: float, zero_share: float) -> float:
    """Return the sparsity S' to reach among non-zero elements: ``(S - s0) / (1 - s0)``; 0 if there are enough zeros."""
    return 0.0 if zero_share >= sparsity else (sparsity - zero_share) / (1 - zero_share)


def stochastic_prune(x: Tensor, threshold: float | Tensor, seed: int | None = None) -> Tensor:
    """Prune unbiasedly: elements below the threshold become 0 or ±threshold so that the mean is kept.

    Args:
        x: any floating tensor; elements of a magnitude of ``threshold`` or more, NaN and Inf stay as they are.
        threshold: tau, 0 or more, a number or a 0-d tensor (no synchronisation); it is rounded to the dtype of ``x``
            first. 0 and NaN prune nothing.
        seed: 64-bit seed; default: one draw from torch's global generator.

    Returns:
        Tensor of the shape and dtype of ``x``. The mean of an element is kept to 2^-23 of the threshold.

    Example:
        >>> x = torch.tensor([3.0, -0.5, 0.0])
        >>> sum(stochastic_prune(x, 1.0, seed=s) for s in range(4000)).div(4000).sub(x).abs().max().item() < 0.05
        True
    """
    x = x.detach()
    tau = threshold_of(threshold, x.dtype, x.device)
    u = uniform(x.numel(), draw_seed() if seed is None else seed, device=x.device).view(x.shape)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    below = x.abs() < tau
    kept = u.to(wide) * tau.to(wide) < x.abs().to(wide)
    return torch.where(below, torch.where(kept, torch.copysign(tau, x), 0.0), x)


def threshold_of(threshold: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the 0-d threshold that elements of ``dtype`` are compared with; a number is rounded to float32 before."""
    if not isinstance(threshold, Tensor):
        threshold = torch.tensor(threshold, dtype=torch.float32, device=device)
    return threshold.to(device, dtype)


def cosine_similarity_of(a: float, sigma: float) -> float:
    """Return the expected cosine between a lognormal gradient and its pruned copy.

        cos^2 = e^(2 sigma^2) / (a e^(sigma^2/2) Phi((ln a - sigma^2)/sigma)
                                 + e^(2 sigma^2) (1 - Phi((ln a - 2 sigma^2)/sigma)))

    For sigma above 2 the second moment is dominated by values too rare to occur in a tensor: real cosines are lower.

    Args:
        a: tau / e^mu, 0 or more.
        sigma: standard deviation of ln|g|.

    Example:
        >>> round(cosine_similarity_of(threshold_for(0.85, 1.0), 1.0), 4)
        0.6279
    """
    sigma = _deviation(sigma)
    if a <= 0:
        return 1.0
    if sigma == 0:
        return min(1.0, 1 / math.sqrt(a))
    t = math.log(a)
    pruned = math.exp(t - 1.5 * sigma**2 + _log_phi((t - sigma**2) / sigma))
    return 1 / math.sqrt(pruned + _phi((2 * sigma**2 - t) / sigma))


def relative_error(exponent_bits: int, mantissa_bits: int, sigma2: float) -> float:
    """Return the expected relative error of a float format on lognormal numbers, scaled by 2^-mean(log2|g|).

    With E = 2^(exponent_bits - 1): in range (|log2| <= E) the mean error of the mantissa, below it everything is lost,
    above it the format saturates,

        eta = (2 Phi(E/s) - 1) / (8 ln2 2^m) + 2 (1 - Phi(E/s)) - 2^E e^(s^2 ln2^2 / 2) Phi(-(E/s + s ln2))

    with s = sigma2 and m = mantissa_bits. This is a derivation of our own in the model of section 5; the printed
    formula differs in the first term.

    Args:
        exponent_bits: 0 or more.
        mantissa_bits: 0 or more.
        sigma2: standard deviation of log2|g|, above 0.

    Example:
        >>> round(relative_error(4, 3, 3.0), 4)
        0.0277
    """
    exponent_bits = check("exponent_bits", exponent_bits, Whole(0, 10))
    mantissa_bits = check("mantissa_bits", mantissa_bits, Whole(0, 52))
    sigma2 = check("sigma2", sigma2, Real(0, above=True))
    reach = 2.0 ** (exponent_bits - 1)
    outside = 2 * _phi(-reach / sigma2)
    credit = reach * _LN2 + (sigma2 * _LN2) ** 2 / 2 + _log_phi(-(reach / sigma2 + sigma2 * _LN2))
    inside = (1 - outside) / (8 * _LN2 * 2.0**mantissa_bits)
    return inside + outside - math.exp(credit)


def best_format(bits: int, sigma2: float) -> FloatFormat:
    """Return the split of ``bits`` with the least :func:`relative_error`.

    Args:
        bits: 2..8, with the sign.
        sigma2: standard deviation of log2|g| (:attr:`LognormalFit.sigma_log2`); 0 gives no exponent bit.

    Raises:
        ConfigurationError: ``bits`` or ``sigma2`` out of range.

    Example:
        >>> best_format(4, 3.0), best_format(8, 3.0).exponent_bits, best_format(8, 5.0).exponent_bits
        (FloatFormat(exponent_bits=3, mantissa_bits=0, bias=3, special='none'), 4, 5)
    """
    bits = check("bits", bits, BITS)
    sigma2 = _deviation(sigma2)
    if sigma2 == 0:
        return FloatFormat(0, bits - 1)
    exponent_bits = min(range(bits), key=lambda e: relative_error(e, bits - 1 - e, sigma2))
    return FloatFormat(exponent_bits, bits - 1 - exponent_bits)


class FittedFormat:
    """The float format of one layer's gradients: split by their spread, placed by their mean.

        split: best_format(bits, sigma2);   scale: 2^-(mu2 + SHIFT), rounded to a power of two

    The scale is the format's bias, so that codes are in the units of the gradient.

    Args:
        bits: 2..8, with the sign.

    Attributes:
        format: one for wide gradients until :meth:`update` has seen some.
        fitted: whether it has.

    Example:
        >>> fitted = FittedFormat(8)
        >>> fitted.update(-20.0, 3.0)
        >>> fitted.format.exponent_bits, fitted.format.min_normal == 2.0 ** (-20 + SHIFT - 6)
        (4, True)

    References:
        Chmiel et al. 2021, section 5; SHIFT, room for the tail above the mean, is that of the published code.
    """

    def __init__(self, bits: int) -> None:
        self.bits: int = check("bits", bits, BITS)
        self.format = best_format(bits, 5.0)
        self.fitted = False

    def update(self, mean_log2: float, sigma_log2: float) -> None:
        """Take in the mean and the standard deviation of log2|g|; a broken step changes nothing."""
        if math.isfinite(mean_log2) and math.isfinite(sigma_log2):
            self.format = best_format(self.bits, sigma_log2).scaled(round(mean_log2) + SHIFT)
            self.fitted = True

    def state_dict(self) -> dict[str, Any]:
        """Return exponent bits, bias, and whether they come from gradients."""
        return {"exponent_bits": self.format.exponent_bits, "bias": self.format.bias, "fitted": self.fitted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`.

        Raises:
            CheckpointError: it is no state of a format with so many bits; nothing is changed.
        """
        found = read_estimate(fitted_format(self.bits), state, of="FittedFormat")
        exponent_bits = found["exponent_bits"]
        self.format = FloatFormat(exponent_bits, self.bits - 1 - exponent_bits, bias=found["bias"])
        self.fitted = found["fitted"]
