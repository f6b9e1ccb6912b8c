"""Simulated delays: the published moments, purity, wrapping, and what users write."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

import pytest
import torch

from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.stragglers.simulated import (
    Delay,
    LognormalDelay,
    SlowRankDelay,
    StallDelay,
    TraceDelay,
    hashed_uniform,
    parse_delay,
)
from lightning_eff.functional.stragglers.timings import write_timings
from tests.bounds import bernstein, chi_square, chi_square_bound, correlation, correlation_bound

ALPHA, BETA = 2 * math.exp(4.5), 5.5
DELAYS = [LognormalDelay(seed=3), StallDelay(seed=3), SlowRankDelay(1, 2.5), TraceDelay(torch.rand(3, 2, 5) + 0.1)]
SHAPE = (200, 50, 12)


def capped_moment(order: int) -> float:
    """E[min(Z / alpha, beta)^order], ln Z ~ N(4, 1), in closed form."""
    phi, cap = NormalDist().cdf, math.log(ALPHA * BETA) - 4
    return math.exp(4 * order + order**2 / 2) / ALPHA**order * phi(cap - order) + BETA**order * (1 - phi(cap))


def test_moments_of_the_papers_delays(seed: int) -> None:
    extra = LognormalDelay(seed=seed).table(*SHAPE) - 1
    mean, second, fourth = (capped_moment(order) for order in (1, 2, 4))
    capped = 1 - NormalDist().cdf(math.log(ALPHA * BETA) - 4)
    assert (mean, math.sqrt(second - mean**2), capped) == pytest.approx((0.496, 0.605, 0.0019), abs=1e-3)
    cases = [
        (extra.mean(), mean, second - mean**2, BETA),
        (extra.square().mean(), second, fourth - second**2, BETA**2),
        ((extra >= BETA).double().mean(), capped, capped * (1 - capped), 1.0),
    ]
    for found, expected, variance, spread in cases:
        bound = bernstein(torch.tensor(variance), torch.tensor(spread), extra.numel(), 6)
        assert abs(found - expected) < bound
    assert extra.max() <= BETA * (1 + 1e-12)


def test_a_stall_is_a_whole_worker_step(seed: int) -> None:
    table = StallDelay(p=0.1, factor=3.0, seed=seed).table(400, 60, 5, base_s=0.02)
    stalled = table[..., 0] > 0.03
    seconds = 0.02 * (1 + 2 * stalled.double())
    torch.testing.assert_close(table, seconds[..., None].expand_as(table), rtol=1e-14, atol=0)
    bound = bernstein(torch.tensor(0.09), torch.tensor(1.0), stalled.numel(), 2)
    assert abs(stalled.double().mean() - 0.1) < bound


def test_one_slow_rank() -> None:
    table = SlowRankDelay(rank=1, factor=2.5).table(3, 3, 2, base_s=2.0)
    assert table[:, 1].eq(5.0).all()
    assert table[:, [0, 2]].eq(2.0).all()


@pytest.mark.parametrize("delay", DELAYS, ids=lambda delay: type(delay).__name__)
def test_one_micro_batch_at_a_time_in_any_order(delay: Delay) -> None:
    table = delay.table(4, 3, 5, base_s=0.25, first_step=7)
    assert table.shape == (4, 3, 5)
    assert table.dtype == torch.float64
    for cell in reversed(list(torch.cartesian_prod(torch.arange(4), torch.arange(3), torch.arange(5)))):
        i, n, m = cell.tolist()
        assert 0.25 + delay.extra_s(7 + i, n, m, 0.25) == pytest.approx(float(table[i, n, m]), rel=1e-14)


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    for delay in DELAYS:
        delay.table(2, 2, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_steps_ranks_and_micro_batches_are_unrelated(seed: int) -> None:
    i, n, m = torch.arange(64).view(-1, 1, 1), torch.arange(64).view(-1, 1), torch.arange(64)
    u = hashed_uniform(seed, i, n, m)
    upper = (i < n).squeeze(-1)
    pairs = {
        "step": (u[:-1], u[1:]),
        "rank": (u[:, :-1], u[:, 1:]),
        "micro-batch": (u[..., :-1], u[..., 1:]),
        "seed": (u, hashed_uniform(seed + 1, i, n, m)),
        "high word": (u, hashed_uniform(seed + (1 << 32), i, n, m)),
        "step and rank": (u[upper], u.transpose(0, 1)[upper]),
    }
    for name, (a, b) in pairs.items():
        assert abs(correlation(a.flatten(), b.flatten())) < correlation_bound(a.numel(), 2 * len(pairs)), name
    assert u.min() > 0
    assert u.max() < 1
    assert chi_square(torch.histc(u, bins=1000, min=0, max=1)) < chi_square_bound(999, 2)


def test_the_first_cell_of_seed_zero_is_nothing_special() -> None:
    assert 0.01 < float(hashed_uniform(0, *(torch.tensor(0),) * 3)) < 0.99


class TestTrace:
    trace = torch.tensor([[[0.1, 0.2], [0.1, 0.4]], [[0.1, 0.1], [0.3, 0.1]]], dtype=torch.float64)

    def test_the_recorded_times_come_back(self) -> None:
        delay = TraceDelay(self.trace)
        assert delay.fast_s == 0.1
        torch.testing.assert_close(delay.table(2, 2, 2, base_s=0.1), self.trace, rtol=1e-14, atol=0)

    def test_it_starts_again_in_every_direction(self) -> None:
        found = TraceDelay(self.trace).table(5, 3, 4, base_s=0.1)
        torch.testing.assert_close(found, self.trace.repeat(3, 2, 2)[:5, :3], rtol=1e-14, atol=0)

    def test_one_short_micro_batch_does_not_make_all_others_slow(self) -> None:
        trace = torch.ones(10, 4, 5)
        trace[3, 2, 4] = 0.01
        assert TraceDelay(trace).table(10, 4, 5).eq(1.0).all()

    def test_a_file(self, tmp_path: Path) -> None:
        write_timings(tmp_path / "run.csv", self.trace, 0.5)
        delay = parse_delay(str(tmp_path / "run.csv"))
        assert delay.extra_s(1, 1, 0, 0.1) == pytest.approx(0.2)

    def test_a_trace_of_nothing(self) -> None:
        trace = torch.zeros(2, 2, 2)
        trace[0, 0, 0] = 1.0
        with pytest.raises(ConfigurationError, match="0 seconds"):
            TraceDelay(trace)


@pytest.mark.parametrize(
    ("spec", "delay"),
    [
        ("lognormal", LognormalDelay()),
        ("lognormal:seed=5", LognormalDelay(seed=5)),
        ("lognormal:alpha=90,beta=2", LognormalDelay(alpha=90.0, beta=2.0)),
        ("stall", StallDelay(p=0.1, factor=3.0)),
        ("stall: p=0.5 , factor=2", StallDelay(p=0.5, factor=2.0)),
        ("slow:rank=3,factor=1.5", SlowRankDelay(rank=3, factor=1.5)),
    ],
)
def test_what_users_write(spec: str, delay: Delay) -> None:
    assert parse_delay(spec) == delay


def test_the_seed_of_the_run_is_the_default() -> None:
    assert parse_delay("stall", seed=9) == StallDelay(seed=9)
    assert parse_delay("stall:seed=4", seed=9) == StallDelay(seed=4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lognormall", "No delay 'lognormall'. Did you mean 'lognormal'?"),
        ("stal:p=0.1", "Did you mean 'stall'?"),
        ("", "Known: lognormal, stall, slow"),
        ("missing.csv", "'missing.csv' cannot be read"),
        ("stall:facto=3", "no option 'facto'. Did you mean 'factor'?"),
        ("stall:p", "p='' is not a number"),
        ("stall:p=often", "p='often' is not a number of type float"),
        ("slow:rank=1.5", "rank='1.5' is not a number of type int"),
        ("stall:p=1.5", "p=1.5 is not allowed; it must be a finite number, 0 or more, 1 at most"),
        ("stall:p=nan", "p=nan is not allowed"),
        ("stall:factor=inf", "factor=inf is not allowed"),
        ("slow:rank=-1", "rank=-1 is not allowed"),
        ("slow:factor=0.5", "factor=0.5 is not allowed"),
        ("lognormal:alpha=0", "alpha=0.0 is not allowed"),
        ("lognormal:beta=-1", "beta=-1.0 is not allowed"),
    ],
)
def test_what_is_not_allowed(spec: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_delay(spec)
    assert message in str(caught.value)
