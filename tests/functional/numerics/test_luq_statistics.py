"""LUQ in the mean: no bias, the variance the paper states, and ablations that these very tests convict."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_eff.functional import luq_codes, luq_quantize, smp_quantize
from lightning_eff.functional.numerics.luq import GradientRounding
from tests.bounds import FALSE_ALARM, bernstein, codebook, lognormal, neighbours

POINTS = (0.001, 0.0078, 0.01, 0.02, 0.03, 0.1, 0.3, 0.5, 0.74, 0.75, 0.76, 0.99)
DRAWS = 1 << 19


def draws_of(points: Tensor, levels: int, seed: int, rounding: GradientRounding = "luq") -> Tensor:
    """(points, DRAWS) float64 quantised copies of each point, for a maximum of one."""
    rows = [
        luq_codes(p.expand(DRAWS), levels=levels, max_abs=1.0, rounding=rounding, seed=seed * 1000 + i).dequantize()
        for i, p in enumerate(points)
    ]
    return torch.stack(rows).double()


def biased(points: Tensor, mean: Tensor, levels: int, draws: int) -> Tensor:
    lower, upper = neighbours(points, codebook(levels))
    x = points.double()
    variance, spread = (x - lower) * (upper - x), torch.maximum(x - lower, upper - x)
    return (mean - x).abs() > bernstein(variance, spread, draws, 2 * points.numel())


@pytest.mark.parametrize("levels", [7, 8])
def test_unbiased_with_the_stated_variance(levels: int, seed: int) -> None:
    points = torch.tensor([*POINTS, *(-p for p in POINTS)])
    q, x = draws_of(points, levels, seed), points.double()
    assert not biased(points, q.mean(1), levels, DRAWS).any()
    # (q - x)^2 takes two values as well, so its own variance gives its bound.
    lower, upper = neighbours(points, codebook(levels))
    up = (x - lower) / (upper - lower).clamp(min=1e-30)
    low, high = (x - lower) ** 2, (upper - x) ** 2
    variance = (x - lower) * (upper - x)
    bound = bernstein(up * (1 - up) * (high - low) ** 2, torch.maximum(low, high), DRAWS, 2 * points.numel())
    assert not ((q - x[:, None]).square().mean(1) - variance).abs().gt(bound).any()
    assert float((bound / variance.clamp(min=1e-30))[variance > 0].max()) < 0.25  # sharp


@pytest.mark.parametrize(
    ("rounding", "innocent"),
    [("nearest", 0.0), ("no_underflow", 1 / 64), ("no_log_rounding", -1 / 64)],
)
def test_the_ablations_are_convicted(rounding: GradientRounding, innocent: float, seed: int) -> None:
    """The same test that passes LUQ fails each biased variant, and only where the variant differs from LUQ."""
    points = torch.tensor(POINTS)
    verdict = biased(points, draws_of(points, 7, seed, rounding).mean(1), 7, DRAWS)
    on_level = points == 0.5
    above = points.ge(1 / 64)
    same = on_level | (above if innocent > 0 else ~above if innocent < 0 else on_level)
    # Midpoints round without bias to nearest only by luck of symmetry; 0.75 lies on one and goes up: biased too.
    assert verdict.tolist() == (~same).tolist()


def test_rounding_to_nearest_halves_heavy_tailed_gradients(seed: int) -> None:
    """E|q| / E|g| is about 0.51 for lognormal gradients rounded to nearest in the log, and 1 for LUQ.

    The ratio of the sampled values is 1 within the bound from the sampled variances.
    """
    x = lognormal(1 << 20).clamp(-(2.0**12), 2.0**12)  # the same maximum whatever the seed
    x[0] = 2.0**12
    levels = codebook(7, 2.0**12)
    lower, upper = neighbours(x.abs(), levels)
    magnitude = x.abs().double()
    variance = ((magnitude - lower) * (upper - magnitude)).mean()
    bound = bernstein(variance, (upper - lower).max(), x.numel(), 4) / magnitude.mean()

    def ratio(rounding: GradientRounding) -> float:
        return float(luq_codes(x, rounding=rounding, seed=seed).dequantize().abs().double().mean() / magnitude.mean())

    assert abs(ratio("luq") - 1) < bound
    assert abs(ratio("nearest") - 1) > 3 * bound
    assert ratio("no_underflow") < 1 - 3 * bound


def test_published_ratio_of_rounding_to_nearest() -> None:
    """0.51 on lognormal gradients (sigma 3 in log2, 1e6 elements, L=8), the figure of the method's specification."""
    ratios = []
    for seed in range(5):
        x = lognormal(1_000_000)
        q = luq_codes(x, levels=8, rounding="nearest", seed=seed).dequantize()
        ratios.append(float(q.abs().double().sum() / x.abs().double().sum()))
    assert 0.4 < sum(ratios) / 5 < 0.75
    assert max(ratios) < 0.9


@pytest.mark.parametrize("levels", [7, 8])
def test_power_of_two_scale_is_unbiased(levels: int, seed: int) -> None:
    points = torch.tensor([0.001, 0.02, 0.3, 0.65, 0.7])
    largest = 0.7  # rounds up to a codebook that ends at 1
    q = torch.stack(
        [
            luq_quantize(p.expand(DRAWS), levels=levels, max_abs=largest, power_of_two=True, seed=seed + 31 * i)
            for i, p in enumerate(points)
        ]
    ).double()
    assert q.abs().max() <= 1.0
    assert not biased(points, q.mean(1), levels, DRAWS).any()


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_smp_divides_the_variance(samples: int, seed: int) -> None:
    draws, points = 1 << 17, torch.tensor([0.005, 0.3, 0.7])
    x = torch.cat([torch.ones(1), points.repeat_interleave(draws)])
    q = smp_quantize(x, samples=samples, seed=seed)[1:].view(3, draws).double()
    lower, upper = neighbours(points, codebook(7))
    p, gap = (points.double() - lower) / (upper - lower), upper - lower
    variance = gap**2 * p * (1 - p) / samples
    error = q - points.double()[:, None]
    spread = torch.maximum(p, 1 - p) * gap
    assert not error.mean(1).abs().gt(bernstein(variance, spread, draws, 6)).any()
    # Fourth central moment of a mean of N two-point values, for the variance of the squared error.
    single = gap**4 * p * (1 - p) * ((1 - p) ** 3 + p**3)
    fourth = (single + 3 * (samples - 1) * (gap**2 * p * (1 - p)) ** 2) / samples**3
    bound = bernstein(fourth - variance**2, spread**2, draws, 6)
    assert not (error.square().mean(1) - variance).abs().gt(bound).any()
    assert bool((bound < variance / 4).all())  # sharp enough to tell N from N + 1


def test_smp_samples_are_independent_between_rows(seed: int) -> None:
    """The sum over a tensor, which is what a weight gradient takes, has its variance divided as well."""
    x = torch.full((4 * 2048,), 0.3)
    x[0] = 1.0
    sums = torch.stack([smp_quantize(x, samples=2, seed=2 * (seed + t)).double().sum() for t in range(300)])
    each = (0.3 - 0.25) * (0.5 - 0.3) / 2
    ratio = float((sums - x.double().sum()).square().mean() / (each * (x.numel() - 1)))
    # Sums of 8191 terms are normal to well below this bound: Laurent-Massart for a chi-square of 300.
    t = math.log(2 / FALSE_ALARM)
    assert ratio < 1 + 2 * math.sqrt(t / 300) + 2 * t / 300
    assert ratio > 1 - 2 * math.sqrt(t / 300)
