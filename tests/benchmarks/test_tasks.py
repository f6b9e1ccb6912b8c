"""The shared tasks: fixed splits, and a summary that says worse when it is worse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.tasks.compare import Run
from benchmarks.tasks.data import DigitsData, StdlibText, stdlib_source
from benchmarks.tasks.summary import Outcome, figure, outcome_table, verdict


def test_digits_split_does_not_follow_the_seed() -> None:
    splits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        data = DigitsData()
        data.setup()
        splits.append(data.validation.tensors[1])
    assert torch.equal(*splits)
    assert (len(data.train), len(data.validation)) == (1200, 597)


def test_text_windows_follow_their_seed_alone() -> None:
    def starts(seed: int) -> list[int]:
        data = StdlibText(context=16, batch_size=4, steps=3, seed=seed)
        data.setup()
        assert len(data.train) == 12
        return data.train.starts

    assert starts(0) == starts(0) != starts(1)
    train, validation = stdlib_source()
    assert int(train.max()) < 128
    assert len(train) > 4 * len(validation) > 0


def test_a_window_predicts_its_next_character() -> None:
    data = StdlibText(context=16, batch_size=4, steps=1)
    data.setup()
    x, y = data.train[0]
    assert x.shape == y.shape == (16,)
    assert torch.equal(x[1:], y[:-1])


def made_up(ours: list[float], *, time: float, kept: int, higher_is_better: bool = True) -> Outcome:
    def runs(values: list[float], size: int) -> list[Run]:
        return [Run([2.0, 1.0], value, layer_bytes=size, model_bytes=2 * size) for value in values]

    return Outcome(
        title="made up",
        quality="accuracy (%)",
        factor=100.0,
        higher_is_better=higher_is_better,
        loss_label="loss, nats",
        loss_factor=1.0,
        runs={"fp32": runs([0.97, 0.99], 100), "luq4": runs(ours, kept)},
        step_s={"fp32": [1.0, 2.0, 1.0], "luq4": [time, 2 * time, time]},
    )


def test_verdict_names_what_is_worse() -> None:
    text = verdict(made_up([0.90, 0.92], time=1.5, kept=13))
    assert "7.00 worse in accuracy" in text
    assert "spread over 2 seeds is 2.00" in text
    assert "1.50x the step time (SLOWER)" in text
    assert "0.13x" in text


def test_verdict_names_what_is_better_or_equal() -> None:
    assert "1.00 better" in verdict(made_up([0.98, 1.00], time=0.5, kept=13))
    assert "0.50x the step time (faster)" in verdict(made_up([0.98, 1.00], time=0.5, kept=13))
    assert "is equal in accuracy" in verdict(made_up([0.97, 0.99], time=0.5, kept=13))
    assert "1.00 worse" in verdict(made_up([0.98, 1.00], time=0.5, kept=13, higher_is_better=False))


def test_verdict_does_not_decide_on_noise() -> None:
    outcome = made_up([0.97, 0.99], time=1.0, kept=13)
    assert "no clear difference in step time" in verdict(outcome)


def test_table_fits_a_terminal_and_figure_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from rich.console import Console

    outcome = made_up([0.90, 0.92], time=1.5, kept=13)
    console = Console(width=80, record=True, file=(tmp_path / "out.txt").open("w"))
    console.print(outcome_table(outcome))
    console.file.close()
    assert "…" not in console.export_text()
    assert figure([outcome, outcome], tmp_path / "deep" / "curves.png").stat().st_size > 5_000
