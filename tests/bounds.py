"""How far the mean of random draws may be from its expectation, from the draws' own variance and range.

Bernstein's inequality holds for every n and every distribution, also for the rare events (an underflow of probability
1e-3) where a normal approximation would cry wolf. The failure probability is shared out over all comparisons of a
test: the family-wise rate of false alarms is at most ``FALSE_ALARM``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FALSE_ALARM = 1e-6


def bernstein(variance: Tensor, spread: Tensor, draws: int, comparisons: int) -> Tensor:
    """Bound on \\|mean of ``draws`` independent values - expectation\\|, for each of ``comparisons`` comparisons.

    Args:
        variance: of one draw.
        spread: largest distance of one draw from its expectation.
        draws: number of independent draws in the mean.
        comparisons: how many such means are compared in the whole test.
    """
    log = math.log(2 * comparisons / FALSE_ALARM)
    return (2 * variance.double() * log / draws).sqrt() + spread.double() * log / (3 * draws)


def neighbours(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The levels just below and above each ``x`` (equal where ``x`` is a level); ``levels`` sorted, float64."""
    x = x.double()
    above = torch.searchsorted(levels, x).clamp(max=levels.numel() - 1)
    upper = levels[above]
    lower = torch.where(upper == x, upper, levels[(above - 1).clamp(min=0)])
    return lower, upper


def codebook(levels: int, max_abs: float = 1.0) -> Tensor:
    """Every value of the format, sorted, float64."""
    magnitudes = max_abs * 2.0 ** torch.arange(1 - levels, 1, dtype=torch.float64)
    return torch.cat([-magnitudes.flip(0), torch.zeros(1, dtype=torch.float64), magnitudes])


def lognormal(numel: int, sigma: float = 3.0) -> Tensor:
    """Numbers like neural gradients: log2 of the magnitude is normal with standard deviation ``sigma``."""
    return torch.randn(numel).mul(sigma).exp2() * torch.randn(numel).sign()


def chi_square_bound(degrees: int, comparisons: int) -> float:
    """Laurent and Massart 2000, lemma 1: P(chi2 > d + 2 sqrt(d t) + 2 t) <= exp(-t)."""
    t = math.log(comparisons / FALSE_ALARM)
    return degrees + 2 * math.sqrt(degrees * t) + 2 * t


def chi_square(counts: Tensor) -> float:
    """Pearson's statistic of counts that are expected to be equal."""
    expected = counts.sum().double() / counts.numel()
    return float(((counts.double() - expected) ** 2 / expected).sum())


def correlation(a: Tensor, b: Tensor) -> float:
    """Mean of the product of two uniform variables, centred and scaled to unit variance."""
    return float(((a.double() - 0.5) * (b.double() - 0.5)).mean() * 12)


def correlation_bound(n: int, comparisons: int) -> float:
    """Each product is within +-3, with variance 1 under independence: Bernstein."""
    t = math.log(2 * comparisons / FALSE_ALARM)
    return math.sqrt(2 * t / n) + t / n
