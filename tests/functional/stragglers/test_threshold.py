"""The decision, what it costs in time, and the factor of the gradient: by hand, by brute force, over two ranks."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.stragglers.threshold import (
    check_timings,
    completed,
    compute_times,
    extra_micro_batches,
    extra_steps,
    gradient_factor,
    starts_next,
    step_times,
)

INF = math.inf
times_of_one_worker = st.lists(st.sampled_from([0.0, 0.25, 1.0, 1.5, 7.0]), min_size=1, max_size=6)


def run_worker(times: list[float], tau: float, min_micro_batches: int) -> tuple[int, float]:
    """A training loop with a clock: what :func:`completed` and :func:`compute_times` predict."""
    clock, done = 0.0, 0
    for seconds in times:
        if not starts_next(clock, done, tau=tau, min_micro_batches=min_micro_batches):
            break
        clock += seconds
        done += 1
    return done, clock


@given(times_of_one_worker, st.sampled_from([-1.0, 0.0, 0.25, 1.0, 2.0, 2.5, 8.0, INF]), st.integers(0, 6))
def test_the_prediction_is_the_loop(times: list[float], tau: float, min_micro_batches: int) -> None:
    done, clock = run_worker(times, tau, min_micro_batches)
    table = torch.tensor(times, dtype=torch.float64)
    counts = completed(table, tau, min_micro_batches)
    assert counts.item() == done
    assert compute_times(table, counts).item() == clock


@pytest.mark.parametrize(
    ("tau", "min_micro_batches", "counts", "seconds"),
    [
        (INF, 1, [3, 3], [3.0, 6.0]),
        (2.0, 1, [3, 2], [3.0, 5.0]),  # a clock that shows tau exactly is not past it
        (1.9, 1, [2, 2], [2.0, 5.0]),  # begun at 1, finished and counted
        (0.5, 1, [1, 1], [1.0, 1.0]),
        (0.0, 1, [1, 1], [1.0, 1.0]),
        (0.0, 2, [2, 2], [2.0, 5.0]),
        (-1.0, 0, [0, 0], [0.0, 0.0]),
        (-1.0, 1, [1, 1], [1.0, 1.0]),
    ],
)
def test_two_workers_by_hand(tau: float, min_micro_batches: int, counts: list[int], seconds: list[float]) -> None:
    timings = check_timings(torch.tensor([[[1.0, 1.0, 1.0], [1.0, 4.0, 1.0]]]), other=0.5)
    found = completed(timings.table, tau, min_micro_batches)
    assert found.tolist() == [counts]
    assert compute_times(timings.table, found).tolist() == [seconds]
    assert step_times(timings, found).tolist() == [max(seconds) + 0.5]


def test_overshoot_is_less_than_one_micro_batch() -> None:
    table = torch.rand(50, 6, 9, dtype=torch.float64)
    counts = completed(table, 3.0)
    last = table.gather(-1, counts[..., None] - 1).squeeze(-1)
    late = compute_times(table, counts) - 3.0
    stopped = counts < 9
    assert stopped.any()
    assert ((late > 0) & (late <= last))[stopped].all()


@pytest.mark.parametrize("min_micro_batches", [-1, -7])
def test_the_least_number_is_not_negative(min_micro_batches: int) -> None:
    with pytest.raises(ConfigurationError, match=f"min_micro_batches={min_micro_batches}"):
        completed(torch.ones(2, 3), 1.0, min_micro_batches)


@pytest.mark.parametrize(
    ("table", "other", "message"),
    [
        (torch.ones(2, 3), 0.0, "(2, 3)"),
        (torch.ones(2, 0, 3), 0.0, "(2, 0, 3)"),
        (torch.ones(2, 3, 4), torch.ones(3), "for each of 2 steps; got shape (3,)"),
        (torch.tensor([[[1.0, 2.0], [math.nan, 1.0]]]), 0.0, "at (0, 1, 0) they are nan"),
        (torch.tensor([[[1.0, INF]]]), 0.0, "at (0, 0, 1) they are inf"),
        (torch.tensor([[[1.0, -2.0]]]), 0.0, "at (0, 0, 1) they are -2.0"),
        (torch.ones(2, 3, 4), torch.tensor([0.0, -1.0]), "other time (step) are finite and not negative; at (1,)"),
        (torch.zeros(2, 3, 4), 1.0, "0 seconds"),
    ],
)
def test_tables_that_are_none(table: Tensor, other: Tensor | float, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        check_timings(table, other)


def test_a_table_is_float64_and_its_own() -> None:
    table = torch.ones(2, 3, 4, dtype=torch.float16, requires_grad=True)
    timings = check_timings(table, torch.tensor(2))
    assert timings.table.dtype == timings.other.dtype == torch.float64
    assert not timings.table.requires_grad
    assert timings.other.tolist() == [2.0, 2.0]


class TestGradient:
    """The factor applied to sums of real vectors, as a strategy would."""

    M = 4
    counts = torch.tensor([4, 1, 3])

    def summed(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """What the all-reduce gives, losses divided by M; and the mean over the computed micro-batches."""
        gradients = torch.randn(len(counts), self.M, 5, dtype=torch.float64)
        used = torch.cat([g[:k] for g, k in zip(gradients, counts.tolist(), strict=True)])
        return used.sum(0) / self.M, used.mean(0)

    def test_computed_is_the_mean_of_what_was_computed(self) -> None:
        total, mean = self.summed(self.counts)
        torch.testing.assert_close(total * gradient_factor(self.counts, self.M), mean, rtol=1e-14, atol=0)

    def test_maximum_counts_dropped_ones_as_zero(self) -> None:
        total, mean = self.summed(self.counts)
        expected = mean * self.counts.sum() / (3 * self.M)
        torch.testing.assert_close(
            total * gradient_factor(self.counts, self.M, "maximum"), expected, rtol=1e-14, atol=0
        )

    def test_one_micro_batch_each(self) -> None:
        total, mean = self.summed(torch.tensor([1, 1, 1]))
        ones = torch.ones(3)
        torch.testing.assert_close(total * gradient_factor(ones, self.M), mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(total * gradient_factor(ones, self.M, "maximum"), mean / self.M, rtol=1e-14, atol=0)

    @pytest.mark.parametrize("counts", [[0, 4, 4], [4, 0, 4], [4, 4, 0]])
    def test_a_worker_without_any_changes_nothing_else(self, counts: list[int]) -> None:
        total, mean = self.summed(torch.tensor(counts))
        torch.testing.assert_close(total * gradient_factor(torch.tensor(counts), self.M), mean, rtol=1e-14, atol=0)

    @pytest.mark.parametrize("workers", range(1, 20))
    @pytest.mark.parametrize("window", [1, 3, 7, 12])
    @pytest.mark.parametrize("normalize", ["computed", "maximum"])
    def test_without_dropping_it_is_one_over_n_to_the_last_bit(self, workers: int, window: int, normalize: str) -> None:
        factor = gradient_factor(torch.full((workers,), window), 12, normalize, window=window)  # type: ignore[arg-type]
        assert factor.item() == 1 / workers

    def test_a_short_window_keeps_the_weight_lightning_gives_it(self) -> None:
        counts = torch.tensor([2, 1])
        assert gradient_factor(counts, 4, window=2).item() == pytest.approx(2 / 3)
        assert gradient_factor(counts, 4).item() == pytest.approx(4 / 3)  # the mean over what was computed
        assert gradient_factor(counts, 4, "maximum", window=2).item() == 0.5

    def test_nothing_computed_is_no_gradient(self) -> None:
        for normalize in ("computed", "maximum"):
            assert gradient_factor(torch.zeros(3), 4, normalize).item() == 0.0  # type: ignore[arg-type]

    def test_what_is_not_allowed(self) -> None:
        with pytest.raises(ConfigurationError, match="Did you mean 'computed'"):
            gradient_factor(self.counts, 4, "compute")  # type: ignore[arg-type]
        for window in (0, 5):
            with pytest.raises(ConfigurationError, match=f"window={window}"):
                gradient_factor(self.counts, 4, window=window)


@given(st.integers(0, 10**6), st.floats(0, 0.99))
def test_compensation_is_enough_and_not_more(number: int, drop_rate: float) -> None:
    for extra in (extra_steps(number, drop_rate), extra_micro_batches(number, drop_rate)):
        assert (number + extra) * (1 - drop_rate) >= number * (1 - 1e-11)
        assert (number + extra - 1) * (1 - drop_rate) < number or number == 0


@pytest.mark.parametrize(
    ("steps", "drop_rate", "extra"), [(90, 0.1, 10), (900, 0.1, 100), (7, 0.0, 0), (100, 0.5, 100)]
)
def test_compensation_by_hand(steps: int, drop_rate: float, extra: int) -> None:
    assert extra_steps(steps, drop_rate) == extra


@pytest.mark.parametrize("drop_rate", [-0.1, 1.0, math.nan])
def test_a_drop_rate_is_a_share(drop_rate: float) -> None:
    with pytest.raises(ConfigurationError, match="drop_rate"):
        extra_steps(10, drop_rate)
