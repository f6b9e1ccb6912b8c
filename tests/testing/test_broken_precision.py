"""The battery of precision plugins fails what is wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lightning_eff.methods import METHODS
from lightning_eff.testing import PrecisionCase, QuantizedPrecisionBattery
from tests.harness import run_ranks

CASE = PrecisionCase(info=METHODS["luq4"], task_options={"width": 72}, steps=4, cuts=(1, 2), saved_bits=4)


class Battery(QuantizedPrecisionBattery):
    launch = staticmethod(functools.partial(run_ranks, init_group=False, timeout_s=100.0))


def call(test: Callable[..., None], case: PrecisionCase, *args: Any) -> str:
    """What a test of the battery says about a case; empty if it passes."""
    try:
        test(Battery(), case, *args)
    except pytest.fail.Exception as failure:
        return str(failure)
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("name", "test", "arguments", "told"),
    [
        ("Forgetful", Battery.test_a_run_cut_anywhere_continues_to_the_same_bits, [2], "does not go on to the same"),
        ("Miscounts", Battery.test_bytes_kept_for_backward_are_counted_truly, [], "counts"),
        ("RoundsNaNAway", Battery.test_a_broken_element_of_an_input_or_gradient_stays_visible, [], "is lost"),
        ("FollowsTheDefault", Battery.test_the_default_dtype_changes_no_number, [], "as the default dtype"),
        ("BreaksTheGraph", Battery.test_compiled_without_a_graph_break_to_the_same_numbers, [], "Unsupported"),
        ("ByRank", Battery.test_ranks_remember_the_same, [], "states of ranks 1 and 0"),
    ],
)
def test_a_wrong_plugin_fails(name: str, test: Callable[..., None], arguments: list[Any], told: str) -> None:
    broken = replace(CASE, classes={"lightning.pytorch": f"tests.testing.broken_precision:{name}"})
    assert told in call(test, broken, *arguments)
    assert call(test, CASE, *arguments) == "", "the right one passes"


def test_bits_that_are_not_kept_fail() -> None:
    told = call(Battery.test_bytes_kept_for_backward_are_counted_truly, replace(CASE, saved_bits=8))
    assert "bytes are kept of" in told


def test_a_method_that_is_said_to_remember_and_does_not_fails() -> None:
    told = call(Battery.test_what_is_remembered_is_needed, replace(CASE, remembering={}))
    assert "it remembers []" in told
