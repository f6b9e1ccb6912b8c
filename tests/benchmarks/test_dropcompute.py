"""The benchmarks of strategy="dropcompute" run on real ranks, at sizes at which their figures mean nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import dropcompute, dropcompute_quality
from lightning_eff.functional.stragglers.threshold import Timings

Main = Callable[[Sequence[str]], int]


def rows(folder: Path) -> list[dict]:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())["rows"]


@pytest.mark.long
def test_samples_per_second(tmp_path: Path) -> None:
    arguments = ["--tiny", "--rounds", "1", "--noise", "stall", "--check", "--results", str(tmp_path)]
    assert dropcompute.main(arguments) == 0
    found = {row["pair"]: row for row in rows(tmp_path)}
    assert list(found) == [
        *(f"{variant} / ddp" for variant in dropcompute.VARIANTS),
        *(f"measured / predicted, over {base}" for base in ("ddp", "ddp, one look", "dropcompute, inf")),
    ]
    assert all(row["value"]["median"] > 0 for row in found.values())
    assert all(found[f"{variant} / ddp"]["details"]["drop_rate"] == 0 for variant in dropcompute.VARIANTS[:-1])
    assert found["ddp / ddp"]["details"]["step_ms"][0] > 4 * 2.0, "no rank slept"


def test_broadcasts_make_ranks_wait_along_the_tree() -> None:
    """Rank 0 sends to 1 and 2, rank 1 to 3; nobody leaves before who it receives from, or sends to, is there."""
    late = torch.tensor([[9.0, 1, 1, 1], [1.0, 9, 1, 1], [1.0, 1, 9, 1], [1.0, 1, 1, 9]])
    assert dropcompute._after_look(late).tolist() == [[9, 9, 9, 9], [9, 9, 1, 9], [9, 1, 9, 1], [1, 9, 1, 9]]


def test_stock_ddp_waits_in_every_micro_batch() -> None:
    table = torch.tensor([[[3.0, 1.0], [1.0, 1.0]], [[1.0, 3.0], [3.0, 1.0]]])
    times = Timings(table, torch.tensor([0.5, 0.0]))
    assert dropcompute._stock_times(times).tolist() == [4.5, 6.0]
    predicted = dropcompute._predict(times, math.inf)
    assert predicted == {"ddp": pytest.approx(10.5 / 8.5), "ddp, one look": 1.0, "dropcompute, inf": 1.0}


@pytest.mark.long
def test_quality(tmp_path: Path) -> None:
    arguments = ["--tiny", "--seeds", "1", "--task", "digits", "--drop-rates", "0.4", "--check"]
    assert dropcompute_quality.main([*arguments, "--results", str(tmp_path)]) == 0
    found = {row["pair"]: row["details"]["runs"][0] for row in rows(tmp_path)}
    assert list(found) == ["0% dropped", "40% dropped, equal steps", "40% dropped, equal samples"]
    plain, fewer, longer = found.values()
    assert (plain["steps"], plain["samples"], fewer["steps"]) == (4, 1.0, 4)
    assert fewer["samples"] < 0.8
    assert longer["steps"] > 4
    assert longer["samples"] > fewer["samples"]


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.4])
def test_plans_drop_what_is_asked(rate: float) -> None:
    counts = dropcompute_quality.planned_counts(rate, 300, seed=1)
    assert counts.shape == (300, dropcompute_quality.RANKS)
    assert counts.min() >= 1
    dropped = 1 - counts.double().mean().item() / dropcompute_quality.MICRO_BATCHES
    assert dropped == pytest.approx(rate, abs=0.005)


@pytest.mark.parametrize("main", [dropcompute.main, dropcompute_quality.main])
def test_a_gpu_is_refused(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "cpu only" in capsys.readouterr().err
