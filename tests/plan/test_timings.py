"""Where planned steps come from: what resampling keeps, what a fit finds, and that both follow their generator."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor

from lightning_eff.functional.stragglers.model import best_threshold, predicted
from lightning_eff.functional.stragglers.simulated import LognormalDelay
from lightning_eff.functional.stragglers.threshold import Timings, check_timings
from lightning_eff.plan.timings import BootstrapSource, DelaySource, FittedSource, Source


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def recorded(steps: int = 6, ranks: int = 3, micro_batches: int = 4) -> Timings:
    return check_timings(torch.rand(steps, ranks, micro_batches, dtype=torch.float64) + 0.1, torch.rand(steps))


SOURCES = {
    "bootstrap": lambda: BootstrapSource(recorded()),
    "fitted": lambda: FittedSource(recorded()),
    "delay": lambda: DelaySource(LognormalDelay(), 4, base_s=0.1, other_s=0.02),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("workers", [1, 2, 3, 40])
def test_every_source_draws_tables(name: str, workers: int) -> None:
    source: Source = SOURCES[name]()
    found = source.draw(5, workers, generator())
    assert check_timings(*found).table.shape == (5, workers, source.micro_batches)
    assert found.table.dtype == found.other.dtype == torch.float64
    assert found.other.shape == (5,)
    assert torch.equal(found.table, source.draw(5, workers, generator()).table)
    assert not torch.equal(found.table, source.draw(5, workers, generator(1)).table)


@pytest.mark.parametrize("name", SOURCES)
def test_another_recording_differs_as_far_as_it_may(name: str) -> None:
    source: Source = SOURCES[name]()
    again = source.again(generator(7))
    assert type(again) is type(source)
    same = torch.equal(again.draw(5, 3, generator()).table, source.draw(5, 3, generator()).table)
    assert same == (name == "delay")


def test_another_recording_keeps_to_its_ranks() -> None:
    timings = recorded()
    again = BootstrapSource(timings).again(generator()).timings
    assert again.table.shape == timings.table.shape
    for n in range(3):
        assert rows(again.table[:, n : n + 1]) <= rows(timings.table[:, n : n + 1])
    assert set(again.other.tolist()) <= set(timings.other.tolist())


def rows(table: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in table.flatten(0, 1).tolist()}


def test_whole_worker_steps_are_drawn() -> None:
    timings = recorded()
    source = BootstrapSource(timings)
    found = source.draw(100, 10, generator())
    assert rows(found.table) == rows(timings.table)
    assert set(found.other.tolist()) == set(timings.other.tolist())
    assert source.worker_steps == 18


def test_every_worker_stands_for_one_rank_and_ranks_for_equally_many() -> None:
    timings = recorded()
    found = BootstrapSource(timings).draw(50, 9, generator()).table
    ranks = [rows(timings.table[:, n : n + 1]) for n in range(3)]
    stands_for = [[n for n in range(3) if rows(found[:, w : w + 1]) <= ranks[n]] for w in range(9)]
    assert all(len(candidates) == 1 for candidates in stands_for)
    assert sorted(candidates[0] for candidates in stands_for) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_few_workers_of_many_ranks_are_not_always_the_same() -> None:
    timings = recorded(ranks=8)
    first = {tuple(BootstrapSource(timings).draw(1, 1, generator(seed)).table[0, 0].tolist()) for seed in range(40)}
    owners = {n for n in range(8) for row in first if row in rows(timings.table[:, n : n + 1])}
    assert len(owners) > 4


@pytest.mark.parametrize(("shift", "a", "b"), [(0.5, 0.2, 0.4), (0.0, 0.5, 0.3), (1.0, 0.0, 1.0)])
def test_a_fit_finds_what_made_the_table(shift: float, a: float, b: float, seed: int) -> None:
    logs = -1 + b * torch.randn(400, 50, 12, dtype=torch.float64) + a * torch.randn(400, 50, 1, dtype=torch.float64)
    fitted = FittedSource(check_timings(shift + logs.exp(), 0.1))
    assert fitted.shift_s == pytest.approx(shift, abs=0.04)
    assert fitted.mean == pytest.approx(-1, abs=0.12)
    assert fitted.step_std == pytest.approx(a, abs=0.06)
    assert fitted.micro_batch_std == pytest.approx(b, abs=0.06)
    drawn = fitted.draw(400, 50, generator()).table
    for quantile in (0.1, 0.5, 0.9):
        worker_s = shift * 12 + logs.exp().sum(-1)
        assert drawn.sum(-1).quantile(quantile) == pytest.approx(float(worker_s.quantile(quantile)), rel=0.02)


def test_constant_times_are_fitted_by_themselves() -> None:
    drawn = FittedSource(check_timings(torch.full((4, 3, 5), 0.25), 0.1)).draw(3, 7, generator())
    torch.testing.assert_close(drawn.table, torch.full_like(drawn.table, 0.25), rtol=1e-9, atol=0)
    single = FittedSource(check_timings(torch.full((1, 1, 1), 0.25))).draw(2, 2, generator())
    torch.testing.assert_close(single.table, torch.full_like(single.table, 0.25), rtol=1e-9, atol=0)


def test_a_zero_among_the_times_can_be_fitted() -> None:
    table = torch.rand(6, 4, 5) + 0.1
    table[0, 0, 0] = 0.0
    assert check_timings(*FittedSource(check_timings(table)).draw(5, 3, generator())).table.isfinite().all()


@pytest.mark.long
@pytest.mark.parametrize(("kind", "tolerance"), [(BootstrapSource, 0.03), (FittedSource, 0.05)])
def test_a_recording_of_eight_ranks_tells_about_64(
    kind: type[BootstrapSource | FittedSource], tolerance: float
) -> None:
    """Against the truth, which is known here: a recording of 200 steps. A fitted tail has no end, the true one has."""
    truth = DelaySource(LognormalDelay(), 12, base_s=0.1, other_s=0.05)
    recording = truth.draw(200, 8, generator(5))
    tau = best_threshold(*recording)
    expected = predicted(*truth.draw(3000, 64, generator(1)), tau)
    found = predicted(*kind(recording).draw(3000, 64, generator(2)), tau)
    assert found.step_s == pytest.approx(expected.step_s, rel=tolerance)
    assert found.drop_rate == pytest.approx(expected.drop_rate, abs=0.02)
    assert found.speedup == pytest.approx(expected.speedup, rel=tolerance)
    assert math.isfinite(tau)
