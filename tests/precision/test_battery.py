"""What every precision method must do, asked of each of them alike; their cases are in ``cases_*.py``."""

from __future__ import annotations

import functools
from pathlib import Path

from lightning_eff.methods import METHODS
from lightning_eff.precision.plugin import QuantizedPrecisionMixin
from lightning_eff.testing import PrecisionBattery, PrecisionCase, QuantizedPrecisionBattery, collect_cases
from tests.harness import run_ranks

CASES = collect_cases(Path(__file__).parent, "tests.precision", PrecisionCase)
QUANTIZED = tuple(case for case in CASES if issubclass(case.info.load_mixin(), QuantizedPrecisionMixin))
launch = functools.partial(run_ranks, init_group=False, timeout_s=100.0)


class TestQuantized(QuantizedPrecisionBattery):
    """Methods with converted layers; see ``lightning_eff.testing.layers``."""

    cases = QUANTIZED
    launch = staticmethod(launch)


class TestOthers(PrecisionBattery):
    """The rest; see ``lightning_eff.testing.precision``."""

    cases = tuple(case for case in CASES if case not in QUANTIZED)
    launch = staticmethod(launch)


def test_every_row_has_a_case() -> None:
    assert {case.info.name for case in CASES} == {info.name for info in METHODS.values() if info.kind == "precision"}
    assert {case.info.name for case in QUANTIZED} >= {"luq4", "fp8", "fp8-delayed", "flexpoint16", "dfp16"}
