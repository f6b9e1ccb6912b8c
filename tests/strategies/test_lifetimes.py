"""Nothing of a strategy outlives what it belongs to: a Trainer, a model and a strategy are used again in every order.

At its neutral setting (a threshold of infinity, one stage) each way of using them ends with the bits of plain
Lightning, or is refused by a typed error before a step. With a real setting the last fit ends with the bits of the same
fit under a strategy that was never used.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_eff.errors import EffError
from tests.harness import run_ranks
from tests.strategies.models import parameters_of
from tests.strategies.scenarios import REFUSED, SCENARIOS
from tests.strategies.uses import M, Run, new_strategy, rows

LONG = pytest.mark.long


def _end(name: str, scenario: str, folder: str, accumulate: int, world: int = 1) -> tuple[Tensor | str, Tensor | None]:
    """Parameters when the scenario has ended, or the error; and those of its last fit under a fresh strategy."""
    run = Run(new_strategy(name), folder, accumulate, world)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = SCENARIOS[scenario](run)
        except EffError as error:
            return type(error).__name__, None
        except ValueError as error:  # Lightning's own refusal
            if "not supported with distributed strategies" not in str(error):
                raise
            return "by Lightning", None
        if not name.startswith("plain") and run.before_last is not None:
            Run(new_strategy(name), folder, accumulate, world).trainer().fit(run.before_last, rows(), rows(2))
            return parameters_of(model), parameters_of(run.before_last)
    return parameters_of(model), None


def _ends(rank: int, world: int, name: str, folder: str, scenarios: list[str]) -> dict[str, Any]:
    """How each scenario ends, one after the other in the same processes, as in a notebook."""
    accumulate = M if name.removeprefix("plain for ") == "dropcompute" else 1
    told = {}
    for scenario in scenarios:
        place = Path(folder) / scenario
        place.mkdir(parents=True, exist_ok=True)
        try:
            told[scenario] = _end(name, scenario, str(place), accumulate, world)
        except Exception as error:  # noqa: BLE001 - told with its scenario
            told[scenario] = f"not typed: {error!r}"
    return told


def _run(name: str, folder: Path, scenarios: list[str], world: int = 1) -> dict[str, Any]:
    """Of rank 0, none of them ended by an error that is not typed."""
    told = run_ranks(_ends, world, name, str(folder), scenarios, init_group=False, timeout_s=110.0)[0]
    assert not {scenario: end for scenario, end in told.items() if isinstance(end, str)}
    refused = {scenario for scenario, (end, _) in told.items() if isinstance(end, str)}
    assert refused == REFUSED.get(name, set()) & set(scenarios)
    return {scenario: ends for scenario, ends in told.items() if scenario not in refused}


@pytest.mark.parametrize("name", ["dropcompute", "one stage"])
def test_at_its_neutral_setting_every_use_ends_as_plain_lightning_does(name: str, tmp_path: Path) -> None:
    mine = _run(name, tmp_path, list(SCENARIOS))
    assert len(mine) > 28
    plain = _run(f"plain for {name}", tmp_path, list(mine))
    for scenario, (weights, _) in mine.items():
        assert torch.equal(weights, plain[scenario][0]), scenario


def test_a_used_strategy_trains_as_a_fresh_one(tmp_path: Path) -> None:
    ends = _run("three stages", tmp_path, list(SCENARIOS))
    fresh = {scenario: pair for scenario, pair in ends.items() if pair[1] is not None}
    assert len(fresh) == 9
    assert all(weights.isfinite().all() for weights, _ in ends.values())
    for scenario, (weights, other) in fresh.items():
        assert torch.equal(weights, other), scenario


TOGETHER = ["fit longer", "find a learning rate within", "an optimizer kept by the user"]


ALSO = [
    "another model in the same trainer", "find a learning rate first", "a layer replaced between fits",
    "frozen between fits", "fit longer from a checkpoint in the same trainer", "validate and test before and after",
    "barebones", "log_every_n_steps=0", "limit_train_batches=0",
]  # fmt: skip


@pytest.mark.parametrize("scenarios", [TOGETHER[:2], pytest.param([*TOGETHER, *ALSO], marks=LONG)], ids=["some", "all"])
def test_a_used_pipeline_of_two_processes_ends_as_in_one(tmp_path: Path, scenarios: list[str]) -> None:
    """What one process ends with is compared with fresh strategies and plain Lightning above."""
    real = _run("two stages", tmp_path / "two", scenarios, world=2)
    emulated = _run("two stages", tmp_path / "one", scenarios)
    for scenario, (weights, _) in real.items():
        assert torch.equal(weights, emulated[scenario][0]), scenario


@pytest.mark.long
def test_two_ranks_that_go_on_stay_equal(tmp_path: Path) -> None:
    for told in run_ranks(
        _ends, 2, "dropcompute", str(tmp_path), [*TOGETHER, *ALSO], init_group=False, timeout_s=110.0
    ):
        for scenario, ends in told.items():
            assert isinstance(ends, tuple), ends
            assert isinstance(ends[0], Tensor), scenario
            if ends[1] is not None:
                assert torch.equal(*ends), scenario
