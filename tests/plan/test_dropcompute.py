"""The plan: the simulation against the closed forms, one repetition against a prediction, and the command line."""

from __future__ import annotations

import inspect
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Generator

from lightning_eff.errors import ConfigurationError, MissingDependencyError, UnknownMethodError
from lightning_eff.functional.stragglers.model import (
    best_threshold,
    expected_micro_batches,
    expected_slowest,
    predicted,
)
from lightning_eff.functional.stragglers.simulated import LognormalDelay, StallDelay
from lightning_eff.functional.stragglers.threshold import Timings, check_timings
from lightning_eff.functional.stragglers.timings import write_timings
from lightning_eff.plan import PLANNERS
from lightning_eff.plan import main as plan
from lightning_eff.plan.dropcompute import Row, figure, main, plan_row, simulate, table
from lightning_eff.plan.timings import BootstrapSource, DelaySource
from tests.bounds import FALSE_ALARM
from tests.functional.stragglers.quadrature import exact_largest_normal

INF = math.inf
LOGNORMAL = DelaySource(LognormalDelay(), 12, other_s=0.5)
STALL = DelaySource(StallDelay(), 8, base_s=0.03, other_s=0.01)


class NormalSource:
    """The cluster of the closed forms: independent normal micro-batches."""

    micro_batches = 12
    worker_steps = INF
    std = 0.2

    def draw(self, steps: int, workers: int, generator: Generator) -> Timings:
        table = 1 + self.std * torch.randn(steps, workers, 12, dtype=torch.float64, generator=generator)
        return check_timings(table.clamp(min=0), 1.0)


@pytest.mark.parametrize(
    ("workers", "steps"),
    [
        (1, 4000),
        (8, 4000),
        (64, 1500),
        pytest.param(512, 600, marks=pytest.mark.long),
        pytest.param(4096, 200, marks=pytest.mark.long),
    ],
)
def test_the_simulation_agrees_with_the_closed_forms(workers: int, steps: int, seed: int) -> None:
    tau = 11.7
    plain, dropping = simulate(
        NormalSource(), workers, [INF, tau], steps=steps, generator=Generator().manual_seed(seed)
    )
    scale = math.sqrt(12) * NormalSource.std
    # The largest of n normal numbers has a standard deviation of 1 at most; Chebyshev needs none of its shape.
    margin = 6 * scale / math.sqrt(steps)
    slowest = expected_slowest(workers, 12, 1.0, NormalSource.std)
    assert plain.step_s - 1 == pytest.approx(12 + scale * exact_largest_normal(workers), abs=margin)
    assert plain.step_s - 1 == pytest.approx(slowest, abs=margin + 0.025 * (slowest - 12))
    assert plain.kept == 1.0
    expected = expected_micro_batches(tau, 12, 1.0, NormalSource.std, finish_begun=True) / 12
    hoeffding = math.sqrt(math.log(2 * 10 / FALSE_ALARM) / (2 * steps * workers))
    assert dropping.kept == pytest.approx(expected, abs=hoeffding)
    assert tau - 1 < dropping.step_s - 1 < min(slowest, tau + 1 + 6 * NormalSource.std)
    assert plain.alone_s == pytest.approx(13.0, abs=6 * scale / math.sqrt(steps * workers))


def test_the_simulation_is_the_prediction_however_many_steps_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = check_timings(torch.rand(60, 5, 7, dtype=torch.float64), 0.1)

    class Once:
        micro_batches = 7
        worker_steps = INF
        drawn = 0

        def draw(self, steps: int, workers: int, generator: Generator) -> Timings:
            self.drawn += steps
            return Timings(timings.table[self.drawn - steps : self.drawn], timings.other[:steps])

    for cells in (1, 100, 1 << 21):
        monkeypatch.setattr("lightning_eff.plan.dropcompute._CELLS", cells)
        found = simulate(Once(), 5, [INF, 2.5], steps=60, min_micro_batches=2, generator=Generator())
        expected = predicted(*timings, 2.5, 2)
        assert found[1].step_s == pytest.approx(expected.step_s, rel=1e-12)
        assert 1 - found[1].kept == pytest.approx(expected.drop_rate, rel=1e-12)
        assert found[1].kept * found[0].step_s / found[1].step_s == pytest.approx(expected.speedup, rel=1e-12)


def test_a_row_is_made_of_its_repetitions() -> None:
    row = plan_row(LOGNORMAL, 16, steps=50, repetitions=4)
    single = [plan_row(LOGNORMAL, 16, steps=50, repetitions=1, seed=seed) for seed in range(4)]
    speedups = torch.tensor([one.speedup for one in single], dtype=torch.float64)
    assert row.speedup == pytest.approx(float(speedups.mean()))
    assert row.speedup_std == pytest.approx(float(speedups.std()))
    assert single[0].speedup_std == 0.0
    assert row.scaling < 16
    assert row.plain_scaling < row.scaling
    assert row == plan_row(LOGNORMAL, 16, steps=50, repetitions=4)
    assert row != plan_row(LOGNORMAL, 16, steps=50, repetitions=4, seed=100)


def test_the_threshold_is_that_of_the_window() -> None:
    row = plan_row(LOGNORMAL, 16, steps=20, repetitions=1, window_steps=30, max_drop_rate=0.04)
    window = LOGNORMAL.draw(30, 16, Generator().manual_seed(0))
    assert row.tau_s == best_threshold(*window, max_drop_rate=0.04) < INF
    assert row.drop_rate < 0.06


def test_one_worker_drops_nothing() -> None:
    row = plan_row(LOGNORMAL, 1)
    assert (row.tau_s, row.drop_rate, row.speedup, row.plain_scaling, row.scaling) == (INF, 0.0, 1.0, 1.0, 1.0)


def test_stalls_are_where_dropping_pays_and_the_formula_misses_it() -> None:
    row = plan_row(STALL, 64, steps=60, repetitions=3, max_drop_rate=1.0)
    assert row.speedup > 2.2
    assert row.ideal_realised < 0.95 * row.speedup


def test_a_run_without_stragglers_is_left_alone() -> None:
    timings = check_timings(torch.full((44, 2, 12), 0.03), 0.01)
    row = plan_row(BootstrapSource(timings), 64, repetitions=2, steps=20)
    assert (row.tau_s, row.speedup, row.ideal_tau_s, row.ideal_speedup) == (INF, 1.0, INF, 1.0)
    assert row.plain_scaling == pytest.approx(64)


@pytest.mark.parametrize("name", ["workers", "steps", "window_steps", "repetitions"])
def test_numbers_start_at_one(name: str) -> None:
    arguments = {"workers": 2, name: 0}
    with pytest.raises(ConfigurationError, match=f"{name}=0"):
        plan_row(LOGNORMAL, **arguments)  # type: ignore[arg-type]


def test_the_least_number_of_micro_batches_is_checked() -> None:
    with pytest.raises(ConfigurationError, match="from 0 to 12 .the micro-batches"):
        plan_row(LOGNORMAL, 2, min_micro_batches=13)


# ------------------------------------------------------------------------------------------------- the command line
QUICK = ["--steps", "5", "--repetitions", "2", "--window-steps", "10"]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    def call(*argv: str) -> str:
        out = io.StringIO()
        assert main([*argv, *QUICK], console=Console(file=out, width=200)) == 0
        return out.getvalue()

    return call


@pytest.fixture
def csv(tmp_path: Path) -> str:
    path = tmp_path / "run.csv"
    write_timings(path, StallDelay().table(20, 4, 6, base_s=0.03), 0.005)
    return str(path)


@pytest.mark.parametrize("more", [[], ["--fitted"]])
def test_a_recorded_run_is_planned(csv: str, tmp_path: Path, run: Callable[..., str], more: list[str]) -> None:
    plot = tmp_path / "plan.png"
    out = run("--timings", csv, "--workers", "64,2,1024", "--plot", str(plot), *more)
    assert [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")] == ["2", "64", "1,024"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"plot: {plot}" in out
    assert ("Only 80 worker-steps were recorded" in out) == (not more)


def test_few_workers_need_no_note(csv: str, run: Callable[..., str]) -> None:
    assert "worker-steps were recorded" not in run("--timings", csv, "--workers", "80", "--no-plot")


def test_a_simulated_cluster_is_planned(run: Callable[..., str]) -> None:
    simulated = ("--delay", "stall:p=0.3", "--workers", "16", "--micro-batches", "6", "--base-s", "0.03", "--no-plot")
    out = run(*simulated)
    assert "plot:" not in out
    assert out == run(*simulated)
    assert out != run(*simulated, "--seed", "5")


def test_the_command_is_found_by_the_name_of_the_method(csv: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("dropcompute", ["--timings", csv, "--workers", "4", "--no-plot", *QUICK]) == 0
    assert "DropCompute" in capsys.readouterr().out
    with pytest.raises(UnknownMethodError, match="Did you mean 'dropcompute'"):
        plan("drop_compute", [])
    assert list(PLANNERS) == ["dropcompute"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--timings", "missing.csv", "--workers", "8"], "cannot be read"),
        (["--delay", "lognorm", "--workers", "8"], "Did you mean 'lognormal'"),
        (["--delay", "stall", "--workers", "8", "--fitted"], "--fitted"),
        (["--delay", "stall", "--workers", "8", "--repetitions", "0"], "repetitions=0"),
        (["--delay", "stall", "--workers", "8", "--max-drop-rate", "2"], "max_drop_rate=2.0"),
        (["--delay", "stall", "--workers", "8", "--min-gain", "-1"], "min_gain=-1.0"),
        (["--delay", "stall", "--workers", "8", "--micro-batches", "0"], "micro_batches=0"),
        (["--delay", "stall", "--workers", "8", "--base-s", "-1"], "base_s=-1.0"),
        (["--delay", "stall", "--workers", "8", "--other-s", "nan"], "other_s=nan"),
    ],
)
def test_what_is_not_allowed(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        main([*argv, "--no-plot"])


@pytest.mark.parametrize("argv", [[], ["--workers", "8"], ["--delay", "stall", "--workers", "8,x"]])
def test_what_the_parser_refuses(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert "usage: python -m lightning_eff plan dropcompute" in capsys.readouterr().err


def test_workers_are_one_or_more(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--delay", "stall", "--workers", "0,8"])
    assert "1 or more" in capsys.readouterr().err


ROWS = [
    Row(8, INF, 1.0, 1.0, 0.0, 1.0, 0.0, 7.0, 7.0, INF, 1.0, 1.0),
    Row(64, 0.5, 1.2, 0.9, 0.1, 1.2, 0.01, 50, 60, 0.6, 1.3, 1.1),
]


def test_the_table_says_everything() -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(table(ROWS))
    for text in ("inf s", "1.200 +- 0.010", "10.0%", "50x", "60x", "1.300", "1.100"):
        assert text in out.getvalue()


def test_without_matplotlib_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"lightning-eff\[plot\].*--no-plot"):
        figure(ROWS, tmp_path / "plan.png")


def test_without_matplotlib_the_plan_is_printed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless a picture was asked for by name."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)
    short = ["--delay", "stall", "--workers", "2", "--steps", "20", "--repetitions", "1"]
    assert main(short) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "speed-up" in printed
    assert "No picture was drawn. The plot needs matplotlib: pip install 'lightning-eff[plot]'" in printed
    with pytest.raises(MissingDependencyError):
        main([*short, "--plot", "plan.png"])
    assert not list(tmp_path.iterdir())


def test_the_planner_drops_what_the_strategy_drops() -> None:
    from lightning_eff.strategies import DropComputeStrategy

    planned, trained = inspect.signature(plan_row).parameters, inspect.signature(DropComputeStrategy).parameters
    for name in ("max_drop_rate", "min_micro_batches"):
        assert planned[name].default == trained[name].default, name


@pytest.mark.parametrize("name", ["missing/plan.png", "plan.nonsense"])
def test_a_plot_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be written"):
        figure(ROWS, tmp_path / name)
