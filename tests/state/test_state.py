"""A real state is taken and given back; newer keys, other widths, layers and ranks are said."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff.errors import CheckpointError, EffError, EffWarning
from lightning_eff.functional import DelayedScale, HindsightMax
from lightning_eff.functional.numerics.flexpoint import Autoflex
from lightning_eff.functional.numerics.lognormal import FittedFormat
from lightning_eff.methods import METHODS
from lightning_eff.optim import bf16_updates
from lightning_eff.precision import FP8Precision
from tests.state.runs import RUNS, task
from tests.state.states import every_run, given_back, loader_of, same, state_of


@every_run
def test_a_real_state_is_taken_and_given_back(name: str) -> None:
    load, tell = loader_of(name)
    state = state_of(name)
    load(copy.deepcopy(state))
    if not {"DropComputeStrategy", "PipelinedBPStrategy"} & set(RUNS[name].path):
        assert given_back(state, tell())


@every_run
def test_newer_keys_are_warned_of_and_left_out(name: str) -> None:
    state = state_of(name)
    owner = state["bf16"] if name.startswith("bf16") else state
    owner["of_tomorrow"] = 3
    load, tell = loader_of(name)
    with pytest.warns(EffWarning, match=r"leaves out: of_tomorrow\. It was made by a newer version"):
        load(state)
    assert "of_tomorrow" not in str(tell())


@every_run
def test_the_row_declares_what_is_saved(name: str) -> None:
    state = state_of(name)
    if name in METHODS and not name.startswith("bf16"):
        assert set(state) == set(METHODS[name].state_keys)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same(METHODS[name].read_state(state), state)


# ------------------------------------------------------------------------------------------------------------ by fields


@pytest.mark.parametrize(
    ("made", "other"),
    [
        (lambda: Autoflex(length=3), [lambda flex: flex.initialise(1.0), lambda flex: flex.update(2.0)]),
        (lambda: DelayedScale(history=3), [lambda scale: scale.update(2.0), lambda scale: scale.update(0.5)]),
        (HindsightMax, [lambda estimate: estimate.update(4.0)]),
        (lambda: FittedFormat(6), [lambda fitted: fitted.update(-20.0, 3.0)]),
    ],
    ids=["Autoflex", "DelayedScale", "HindsightMax", "FittedFormat"],
)
def test_estimates_by_themselves_take_a_state_as_a_whole_or_not_at_all(made: Any, other: Any) -> None:
    estimate = made()
    for change in other:
        change(estimate)
    state = estimate.state_dict()
    restored = made()
    restored.load_state_dict(state)
    assert restored.state_dict() == state
    fresh = made()
    before = fresh.state_dict()
    for key in state:
        for value in ("banana", -1.5, math.inf, [None], torch.tensor(1.0), {}):
            with pytest.raises(CheckpointError, match=type(estimate).__name__):
                fresh.load_state_dict({**state, key: value})
            assert same(fresh.state_dict(), before)
        with pytest.raises(CheckpointError, match=f"{key} is missing"):
            fresh.load_state_dict({k: v for k, v in state.items() if k != key})


def test_the_state_of_another_width_is_refused_by_name() -> None:
    wide = FittedFormat(8)
    wide.update(-20.0, 20.0)
    assert wide.format.exponent_bits > 5
    with pytest.raises(
        CheckpointError, match=r"exponent_bits=\d is not allowed; it must be a whole number from 0 to 5"
    ):
        FittedFormat(6).load_state_dict(wide.state_dict())


def test_the_error_names_method_key_found_expected_and_what_to_do() -> None:
    load, _ = loader_of("luq4")
    state = state_of("luq4")
    state["memory"]["net.2"]["grad"]["value"] = -3.0
    with pytest.raises(CheckpointError) as caught:
        load(state)
    for part in ("luq4", "memory['net.2']['grad']['value']=-3.0", "0 or more", RUNS["luq4"].path[0]):
        assert part in str(caught.value)
    assert isinstance(caught.value, EffError | RuntimeError)


def test_damaged_streams_of_random_numbers_are_refused() -> None:
    optimizer = bf16_updates(torch.optim.SGD([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], lr=0.1), update="sr")
    state = optimizer.state_dict()
    assert state["bf16"]["streams"] == [0]
    for streams in ([], [0, 1], [-1], [2**63], [0.5], ["0"], [True], {0: 1}, "0", 3, torch.zeros(1)):
        state["bf16"]["streams"] = streams
        with pytest.raises(CheckpointError, match="streams"):
            optimizer.load_state_dict(copy.deepcopy(state))
    assert optimizer.state_dict()["bf16"]["streams"] == [0]


def converted(name: str) -> Any:
    """The plugin of a run, its model converted."""
    (plugin,) = RUNS[name].options()["plugins"]
    plugin.convert_module(task("sgd"))
    return plugin


def test_layers_that_were_renamed_are_named() -> None:
    state = state_of("luq4")
    state["memory"] = {"body.2": state["memory"]["net.2"]}
    with pytest.warns(
        EffWarning, match=r"remembers nothing of 1 layers: net\.2\. It remembers others.*body\.2.*not exact"
    ):
        converted("luq4").load_state_dict(state)


def test_another_variant_of_a_method_goes_on() -> None:
    """From fp8 to fp8-delayed there is nothing to remember yet; back again, what was remembered is left out."""
    with pytest.warns(EffWarning, match=r"fp8-delayed: the checkpoint remembers nothing of 1 layers"):
        converted("fp8-delayed").load_state_dict({"phase": "quantized"})
    plugin = FP8Precision()
    plugin.load_state_dict(state_of("fp8-delayed"))
    assert plugin.state_dict() == {"phase": "quantized"}


def test_keys_of_a_subclass_are_its_own() -> None:
    class Mine(FP8Precision):  # type: ignore[misc,valid-type]
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "mine": 3}

    Mine().load_state_dict(Mine().state_dict())


def test_another_number_of_ranks_is_said() -> None:
    state = state_of("gradient_pruning")
    state["ranks"] = state["ranks"] * 3
    load, tell = loader_of("gradient_pruning")
    with pytest.warns(EffWarning, match="is of 3 ranks, this run has 1.*not exact"):
        load(state)
    assert tell()["ranks"] == state["ranks"][:1]
