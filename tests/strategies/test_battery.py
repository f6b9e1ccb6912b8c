"""What every strategy must do, asked of each of them alike; their cases are in ``cases_*.py``."""

from __future__ import annotations

import functools
from pathlib import Path

from lightning_eff.methods import METHODS
from lightning_eff.testing import StrategyBattery, StrategyCase, collect_cases
from tests.harness import run_ranks

CASES = collect_cases(Path(__file__).parent, "tests.strategies", StrategyCase)


class TestStrategies(StrategyBattery):
    """See ``lightning_eff.testing.strategies``."""

    cases = CASES
    launch = staticmethod(functools.partial(run_ranks, init_group=False, timeout_s=100.0))


def test_every_row_has_a_case() -> None:
    assert {case.info.name for case in CASES} == {info.name for info in METHODS.values() if info.kind == "strategy"}
