"""Methods of somebody else pass the batteries, with the processes that come with them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lightning_eff.testing import CallbackBattery, CallbackCase, Provocation, StrategyBattery, StrategyCase
from lightning_eff.testing.ranks import RanksFailedError, close_ranks, run_ranks
from tests.testing import third_party

NUDGE = CallbackCase(
    info=third_party.NUDGE,
    classes={"lightning.pytorch": "tests.testing.third_party:Begins"},
    options={"size": 0.02},
    neutral={"size": 0.0},
    wrong={"size": -1.0},
    refusals={"bf16-true": Provocation(trainer={"precision": "bf16-true"})},
    card=third_party.CARDS / "nudge.md",
)
FADE = StrategyCase(
    info=third_party.FADE,
    classes={"lightning.pytorch": "tests.testing.third_party:FadeStrategy"},
    imports=("tests.testing.third_party",),
    options={"rate": 0.9},
    neutral={"rate": 1.0},
    refusals={"manual_optimization": Provocation(task={"manual": True})},
    card=third_party.CARDS / "fade.md",
)


@pytest.fixture(scope="module", autouse=True)
def _processes() -> Iterator[None]:
    """Started before the leak police looks, and ended after it."""
    assert run_ranks(add, 2, 3) == [3, 4]
    yield
    close_ranks()


class TestNudge(CallbackBattery):
    case = NUDGE


class TestFade(StrategyBattery):
    case = FADE


def add(rank: int, world_size: int, number: int) -> int:
    assert world_size == 2
    return rank + number


def fail(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 cannot")


def leave(rank: int, world_size: int, how: str) -> None:
    if rank == 1 and how == "dies":
        os._exit(3)
    while rank == 1:
        time.sleep(1.0)


def call(battery: type[CallbackBattery] | type[StrategyBattery], test: str, case: object, *args: object) -> str:
    """What a test of the battery says about a case; empty if it passes."""
    try:
        getattr(battery(), test)(case, *args)
    except pytest.fail.Exception as failure:
        return str(failure)
    return ""


def broken(name: str) -> CallbackCase:
    return replace(NUDGE, classes={"lightning.pytorch": f"tests.testing.third_party:{name}"})


NEUTRAL = ("test_the_neutral_setting_is_plain_lightning", "lightning.pytorch")
RESUME = ("test_a_run_cut_anywhere_continues_to_the_same_bits", 6)
STATE = ("test_the_state_in_a_checkpoint_is_that_of_the_row",)
FIGURES = ("test_every_logged_figure_is_documented_and_the_other_way_round",)
REFUSED = ("test_every_conflict_of_the_row_is_refused", "bf16-true")


@pytest.mark.parametrize(
    ("name", "test", "told"),
    [
        ("NeverNeutral", NEUTRAL, "the neutral setting is not plain Lightning"),
        ("Forgetful", RESUME, "does not go on to the same bits"),
        ("ChangedBySaving", ("test_saving_changes_nothing",), "to save a checkpoint changes the run"),
        ("CountsValidation", ("test_evaluation_leaves_no_trace",), "evaluation changes the run"),
        ("WithoutState", STATE, r"a checkpoint has \[\], the row \['calls'\]"),
        ("SavesMore", STATE, r"a checkpoint has \['calls', 'more'\]"),
        ("Undocumented", FIGURES, r"does not document: \['eff/nudge/sign'\]"),
        ("Silent", FIGURES, r"does not log what its row documents: \['eff/nudge/size'\]"),
        ("RefusesNothing", REFUSED, "'bf16-true' is not refused"),
        ("RefusesUntyped", REFUSED, "is to end in UnsupportedCombinationError, and does in .*ValueError"),
        ("RefusesNameless", REFUSED, "does not name the method"),
        ("RefusesLate", REFUSED, "is refused only after step 10"),
        ("TakesAnything", ("test_wrong_options_are_named",), "takes size=-1.0"),
        ("LosesItsOptions", ("test_a_copy_trains_as_the_original", "pickle"), "a copy by pickle differs"),
        ("CopiesItsRun", ("test_a_copy_of_a_used_one_begins_a_new_run", "deepcopy, used"), "a copy by deepcopy, used"),
        ("ByRank", ("test_two_ranks_stay_replicas_and_resume",), "weights of the two ranks"),
        ("WithoutRow", ("test_the_row_is_complete",), "the object carries None in place of its row"),
    ],
)
def test_a_wrong_callback_fails(name: str, test: tuple[object, ...], told: str) -> None:
    found = call(CallbackBattery, str(test[0]), broken(name), *test[1:])
    assert re.search(told, found, re.DOTALL), found
    assert call(CallbackBattery, str(test[0]), NUDGE, *test[1:]) == "", "the right one passes"


def test_a_state_that_only_pickle_reads_fails() -> None:
    with pytest.raises(Exception, match="weights_only|Unsupported"):
        call(CallbackBattery, "test_saving_changes_nothing", broken("SavesAnObject"))


def test_a_state_that_the_row_does_not_take_fails() -> None:
    from lightning_eff.errors import CheckpointError

    with pytest.raises(CheckpointError, match="calls"):
        call(CallbackBattery, STATE[0], broken("SavesNegative"))


def test_ranks_that_drift_apart_fail() -> None:
    drifting = replace(FADE, classes={"lightning.pytorch": "tests.testing.third_party:DriftingStrategy"})
    told = call(StrategyBattery, "test_all_ranks_end_with_the_same_weights", drifting)
    assert "weights of ranks 1 and 0" in told


def test_what_one_process_is_said_to_emulate_is_compared() -> None:
    """Its ranks see other data than one process."""
    told = call(StrategyBattery, "test_one_process_emulates_many", replace(FADE, emulated=True))
    assert "one process does not compute what 2 do" in told


def test_a_conflict_without_a_provocation_fails() -> None:
    told = call(CallbackBattery, REFUSED[0], replace(NUDGE, refusals={}), "bf16-true")
    assert told == "nudge: no provocation for the conflict 'bf16-true' of the row"


def test_a_provocation_of_no_conflict_fails() -> None:
    told = call(CallbackBattery, REFUSED[0], replace(NUDGE, refusals={"fsdp": Provocation()}), "fsdp")
    assert "provokes 'fsdp', which is no conflict of the row" in told


def test_a_case_at_work_that_changes_nothing_fails() -> None:
    told = call(CallbackBattery, "test_at_work_it_changes_what_it_says", replace(NUDGE, options={"size": 0.0}))
    assert "changes=True, but the weights are those of plain Lightning" in told


def test_no_neutral_setting_needs_a_reason() -> None:
    told = call(CallbackBattery, NEUTRAL[0], replace(NUDGE, neutral=None), NEUTRAL[1])
    assert "no_neutral does not say why" in told


def test_a_method_without_a_card_fails() -> None:
    told = call(CallbackBattery, "test_the_row_is_complete", replace(NUDGE, card=None))
    assert "nudge has no card" in told


def test_a_metric_that_is_not_documented_needs_no_excuse() -> None:
    told = call(CallbackBattery, FIGURES[0], replace(NUDGE, unlogged={"eff/nudge/sign": "never"}))
    assert "unlogged names what the row does not document" in told


MODULE = """
from lightning_eff.testing import CallbackBattery, CallbackCase
from tests.testing.third_party import CARDS, NUDGE

class TestMine(CallbackBattery):
    {case}
"""


def collected(pytester: pytest.Pytester, case: str, *arguments: str) -> pytest.RunResult:
    pytester.makepyfile(MODULE.format(case=case))
    return pytester.runpytest_inprocess("-q", "-p", "no:cacheprovider", *arguments)


def test_a_class_with_a_case_is_all_it_takes(pytester: pytest.Pytester) -> None:
    case = 'case = CallbackCase(info=NUDGE, classes={"lightning.pytorch": "tests.testing.third_party:Nudge"}, '
    result = collected(pytester, case + 'card=CARDS / "nudge.md")', "-k", "row")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*no provocation for the conflict 'bf16-true' of the row"])


def test_a_class_without_a_case_is_told(pytester: pytest.Pytester) -> None:
    result = collected(pytester, "pass")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*TestMine has no case. Give it one*"])


def test_a_rank_that_raises_is_told_and_serves_on() -> None:
    with pytest.raises(RanksFailedError, match=r"(?s)rank 1.*ValueError: rank 1 cannot"):
        run_ranks(fail, 2)
    assert run_ranks(add, 2, 0) == [0, 1]


@pytest.mark.long
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_that_is_lost_is_told_and_replaced(how: str) -> None:
    with pytest.raises(RanksFailedError, match="rank 1\nit(s process has ended| has not returned)"):
        run_ranks(leave, 2, how, timeout_s=5.0)
    assert run_ranks(add, 2, 0) == [0, 1]
    close_ranks()
