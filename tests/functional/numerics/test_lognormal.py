"""The closed forms of lognormal gradients: published tables, Monte Carlo within its own bounds, invariants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.numerics.float_format import FloatFormat
from lightning_eff.functional.numerics.lognormal import (
    best_format,
    cosine_similarity_of,
    lognormal_fit,
    relative_error,
    remaining_sparsity,
    sparsity_of,
    stochastic_prune,
    threshold_for,
)
from tests.bounds import FALSE_ALARM, bernstein

SPARSITIES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95)
THRESHOLDS = {  # sigma -> a, five significant figures
    0.5: (2.1999, 3.7681, 5.6647, 7.5542, 11.331, 22.663),
    1.0: (2.4008, 4.8796, 7.8223, 10.687, 16.312, 32.923),
    1.5: (2.5109, 6.3587, 11.448, 16.641, 27.12, 58.575),
    2.0: (2.5747, 8.2531, 16.989, 26.692, 47.657, 115.82),
    2.5: (2.6141, 10.691, 25.376, 43.399, 85.907, 240.91),
    3.0: (2.6399, 13.842, 38.06, 71.136, 157.1, 515.21),
    4.0: (2.6698, 23.208, 86.333, 193.92, 538.47, 2464.4),
}
BREAKPOINTS = {  # bits -> {exponent bits below: sigma2 at which one more is better}, cut off after the printed digits
    3: {0: 0.29, 1: 0.75},
    4: {0: 0.24, 1: 0.58, 2: 1.43},
    5: {0: 0.21, 1: 0.49, 2: 1.13, 3: 2.72},
    6: {0: 0.19, 1: 0.43, 2: 0.96, 3: 2.2, 4: 5.22},
    7: {3: 1.89, 4: 4.28, 5: 10.1},
    8: {3: 1.68, 4: 3.71, 5: 8.36, 6: 19.9},
}
SIGMAS = (0.3, 1.0, 2.0, 3.0, 5.0)


def lognormal(numel: int, sigma: float, mu: float = 0.0) -> Tensor:
    """Numbers whose ln|g| is normal(mu, sigma), random signs, float64."""
    g = torch.randn(numel, dtype=torch.float64).mul(sigma).add(mu).exp()
    return g * (torch.rand(numel) < 0.5).double().mul(2).sub(1)


@pytest.mark.parametrize("sigma", THRESHOLDS)
def test_thresholds_of_the_table(sigma: float) -> None:
    for sparsity, expected in zip(SPARSITIES, THRESHOLDS[sigma], strict=True):
        found = threshold_for(sparsity, sigma)
        assert found == pytest.approx(expected, rel=5e-5)  # half a unit of the fifth figure
        assert sparsity_of(found, sigma) == pytest.approx(sparsity, abs=1e-10)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_two_forms_of_the_sparsity_agree(sigma: float) -> None:
    for t in torch.linspace(-3 * sigma, 6 * sigma, 41).tolist():
        a, e, root = math.exp(t), math.exp(sigma**2 / 2), math.sqrt(2)
        terms = e * math.erf(sigma / root - t / (root * sigma)) + a * math.erf(t / (root * sigma)) - e
        bound = 1e-10 + 4e-16 * e / a  # the second form cancels: its rounding is that of its largest term
        assert sparsity_of(a, sigma) == pytest.approx(0.5 + terms / (2 * a), abs=bound)


@pytest.mark.parametrize("sigma", [0.0, 1e-3, 0.5, 2.0, 10.0, 40.0])
def test_sparsity_rises_from_zero_to_one(sigma: float) -> None:
    found = [
        sparsity_of(math.exp(t), sigma)
        for t in torch.linspace(-9 - 5 * sigma, 20 + 40 * sigma, 200).clamp(max=700).tolist()
    ]
    assert found == sorted(found)
    assert found[0] < 1e-4
    assert sparsity_of(0.0, sigma) == 0.0
    assert sparsity_of(math.exp(min(20 + sigma**2, 700)), sigma) > 0.49
    for sparsity in (1e-6, 0.5, 0.99, 0.9999):
        if sigma < 40:
            assert sparsity_of(threshold_for(sparsity, sigma), sigma) == pytest.approx(sparsity, abs=1e-8)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("target", [0.5, 0.85, 0.95])
def test_pruning_reaches_the_target(sigma: float, target: float, seed: int) -> None:
    n = 400_000
    pruned = stochastic_prune(lognormal(n, sigma, mu=-7.0), math.exp(-7.0) * threshold_for(target, sigma), seed)
    bound = bernstein(torch.tensor(target * (1 - target)), torch.tensor(1.0), n, 2 * 15)
    assert abs(float((pruned == 0).double().mean()) - target) < float(bound)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("target", [0.5, 0.85])
def test_pruning_from_a_fit_is_within_the_promise(sigma: float, target: float, seed: int) -> None:
    g = lognormal(1 << 20, sigma, mu=-9.0).float()
    fit = lognormal_fit(g)
    pruned = stochastic_prune(g, math.exp(fit.mu) * threshold_for(target, fit.sigma), seed)
    assert abs(float((pruned == 0).float().mean()) - target) < 0.003  # the card's promise; the deviation is 0.0005


def test_pruning_is_unbiased(seed: int) -> None:
    draws, tau = 20_000, 1.5
    x = torch.tensor([0.0, 1e-3, -0.1, 0.7, -1.2, 1.4999, 1.5, -7.0])
    found = stochastic_prune(x.expand(draws, -1).contiguous(), tau, seed).double()
    assert set(found.abs().unique().tolist()) <= {0.0, 1.5, 7.0}
    a = x.double().abs().clamp(max=tau)
    bound = bernstein(a * (tau - a), torch.full_like(a, tau), draws, 2 * 8) + tau * 2.0**-23
    assert bool(((found.mean(0) - x.double()).abs() <= bound).all())
    assert torch.equal(found[:, 6:], x[6:].double().expand(draws, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pruned_values_are_zero_kept_or_the_threshold_in_any_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(60, 50).to(dtype).t()
    tau = torch.tensor(0.7).to(dtype)
    found = stochastic_prune(x, 0.7, seed=2)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    kept = x.abs() >= tau
    assert torch.equal(found[kept], x[kept])
    rest = found[~kept]
    assert bool(((rest == 0) | (rest.abs() == tau)).all())
    assert bool((rest * x[~kept] >= 0).all())
    assert torch.equal(stochastic_prune(x, torch.tensor(0.7), seed=2), found)
    assert torch.equal(stochastic_prune(x * 4, 2.8, seed=2), found * 4)


def test_no_threshold_prunes_nothing_and_damage_stays_visible() -> None:
    x = torch.tensor([1.0, -2.0, 0.0, math.nan, math.inf, -math.inf])
    for tau in (0.0, math.nan, torch.tensor(math.nan)):
        assert torch.equal(stochastic_prune(x, tau, seed=1).nan_to_num(9.0), x.nan_to_num(9.0))
    found = stochastic_prune(x, 1e9, seed=1)
    assert bool(found[3].isnan())
    assert found[4:].tolist() == [math.inf, -math.inf]
    assert stochastic_prune(torch.empty(0), 1.0).numel() == 0


def test_pruning_draws_one_seed() -> None:
    x = torch.randn(1000)
    torch.manual_seed(1)
    first = stochastic_prune(x, 1.0)
    torch.manual_seed(1)
    assert torch.equal(stochastic_prune(x, 1.0), first)
    assert not torch.equal(stochastic_prune(x, 1.0), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_fit_finds_mean_and_deviation(dtype: torch.dtype, seed: int) -> None:
    n, mu, sigma = 200_000, -11.0, 2.3
    g = lognormal(n, sigma, mu)
    g[: n // 4] = 0
    fit = lognormal_fit(g.to(dtype).view(500, 400).t())
    z = math.sqrt(2 * math.log(2 * 12 / FALSE_ALARM)) * sigma / math.sqrt(0.75 * n)
    rounding = torch.finfo(dtype).eps  # of one logarithm
    assert abs(fit.mu - mu) < z + rounding
    assert abs(fit.sigma - sigma) < z + rounding
    assert fit.zero_share == 0.25
    assert fit.sigma_log2 == pytest.approx(fit.sigma / math.log(2))


def test_fits_of_awkward_tensors() -> None:
    assert lognormal_fit(torch.full((10,), -4.0)) == pytest.approx((math.log(4.0), 0.0, 0.0), abs=1e-6)
    for x, share in ((torch.zeros(5), 1.0), (torch.empty(0), 0.0)):
        fit = lognormal_fit(x)
        assert math.isnan(fit.mu)
        assert math.isnan(fit.sigma)
        assert fit.zero_share == share
    for bad in (math.nan, math.inf):
        assert math.isnan(lognormal_fit(torch.tensor([1.0, bad])).mu)
        assert math.isnan(lognormal_fit(torch.tensor([1.0, bad])).sigma)
    assert lognormal_fit(torch.tensor([1e-42, 1e-42])).mu == pytest.approx(math.log(1e-42), abs=1e-3)


def test_a_constant_tensor_is_pruned_as_wanted(seed: int) -> None:
    x = torch.full((100_000,), 0.3)
    fit = lognormal_fit(x)
    pruned = stochastic_prune(x, math.exp(fit.mu) * threshold_for(0.8, 0.0), seed)
    bound = bernstein(torch.tensor(0.16), torch.tensor(1.0), x.numel(), 2)
    assert abs(float((pruned == 0).double().mean()) - 0.8) < float(bound)
    assert sparsity_of(5.0, 0.0) == pytest.approx(sparsity_of(5.0, 1e-6), abs=1e-9)
    assert cosine_similarity_of(5.0, 0.0) == pytest.approx(cosine_similarity_of(5.0, 1e-6), abs=1e-5)


def test_zeros_that_are_there_count() -> None:
    assert remaining_sparsity(0.9, 0.5) == pytest.approx(0.8)
    assert remaining_sparsity(0.5, 0.6) == 0.0
    assert remaining_sparsity(0.5, 1.0) == 0.0
    assert remaining_sparsity(0.85, 0.0) == 0.85


@pytest.mark.parametrize(("sigma", "sparsity", "expected"), [(1.0, 0.85, 0.6279), (2.0, 0.9, 0.9822)])
def test_cosines_of_the_card(sigma: float, sparsity: float, expected: float) -> None:
    assert cosine_similarity_of(threshold_for(sparsity, sigma), sigma) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_the_cosine_is_that_of_pruned_tensors(sigma: float, seed: int) -> None:
    g = lognormal(1_000_000, sigma)
    for sparsity in (0.5, 0.85, 0.95):
        a = threshold_for(sparsity, sigma)
        pruned = stochastic_prune(g, a, seed)
        cosine = float((g * pruned).sum() / (g.norm() * pruned.norm()))
        assert cosine == pytest.approx(cosine_similarity_of(a, sigma), rel=0.01)
    assert cosine_similarity_of(0.0, sigma) == 1.0


@pytest.mark.parametrize(
    ("exponent", "mantissa", "sigma2", "expected", "digits"),
    [(4, 3, 3.0, 0.0277, 4), (5, 2, 5.0, 0.0460, 4), (3, 2, 1.5, 0.0495, 4), (3, 0, 3.0, 0.285, 3)],
)
def test_relative_errors_of_the_card(exponent: int, mantissa: int, sigma2: float, expected: float, digits: int) -> None:
    assert round(relative_error(exponent, mantissa, sigma2), digits) == expected


@pytest.mark.parametrize(("exponent", "mantissa", "sigma2"), [(4, 3, 3.0), (5, 2, 5.0), (3, 2, 1.5)])
def test_the_relative_error_is_that_of_the_model(exponent: int, mantissa: int, sigma2: float, seed: int) -> None:
    """Uniform rounding error in range, 0 below, the largest value above: the mean of |g - q| / |g|."""
    n = 400_000
    e = torch.randn(n, dtype=torch.float64) * sigma2
    reach = 2.0 ** (exponent - 1)
    fraction = (e - e.floor()).exp2()
    inside = torch.rand(n, dtype=torch.float64) * 2.0 ** -(mantissa + 1) / fraction  # |error| up to half a step
    error = torch.where(e < -reach, 1.0, torch.where(e > reach, 1 - (reach - e).exp2(), inside))
    bound = bernstein(error.var() * 1.1, torch.tensor(1.0), n, 2 * 3)
    # 1/(8 ln2) is the mean of 1/(4 * 2^f) for a uniform fraction f, exact for sigma2 of an octave and more
    assert abs(float(error.mean()) - relative_error(exponent, mantissa, sigma2)) < float(bound) + 2e-4


@pytest.mark.parametrize("bits", BREAKPOINTS)
def test_breakpoints_of_the_best_format(bits: int) -> None:
    for below, printed in BREAKPOINTS[bits].items():
        low, high = printed * 0.8, printed * 1.25
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if best_format(bits, middle).exponent_bits <= below else (low, middle)
        unit = 0.1 if printed in (10.1, 19.9) else 0.01
        assert printed - unit < low < printed + 1.2 * unit, (bits, below, low)


def test_the_best_formats_are_the_known_ones() -> None:
    assert best_format(4, 2.0) == FloatFormat(3, 0)
    assert best_format(8, 3.0) == FloatFormat(4, 3)
    assert best_format(8, 5.0) == FloatFormat(5, 2)
    assert best_format(8, 0.0) == FloatFormat(0, 7)
    assert best_format(2, 100.0).bits == 2
    widths = [best_format(8, 10**t).exponent_bits for t in torch.linspace(-2, 2, 100).tolist()]
    assert widths == sorted(widths)


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (threshold_for, (1.0, 1.0), "sparsity=1.0"),
        (threshold_for, (0.5, -1.0), "sigma=-1.0"),
        (threshold_for, (0.5, math.nan), "sigma=nan"),
        (sparsity_of, (1.0, math.inf), "sigma=inf"),
        (cosine_similarity_of, (1.0, -2.0), "sigma=-2.0"),
        (relative_error, (4, 3, 0.0), "sigma2=0.0"),
        (best_format, (9, 1.0), "bits=9"),
        (best_format, (1, 1.0), "bits=1"),
        (best_format, (8, math.nan), "sigma=nan"),
    ],
)
def test_what_is_out_of_range_is_named(function: Any, arguments: Any, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        function(*arguments)
