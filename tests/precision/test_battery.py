"""What every method with converted layers must do, asked of each of them alike; their cases are in ``cases_*.py``."""

from __future__ import annotations

import functools
from pathlib import Path

from lightning_eff.methods import METHODS
from lightning_eff.precision.plugin import QuantizedPrecisionMixin
from lightning_eff.testing import PrecisionCase, QuantizedPrecisionBattery, collect_cases
from tests.harness import run_ranks

CASES = collect_cases(Path(__file__).parent, "tests.precision", PrecisionCase)


class TestQuantized(QuantizedPrecisionBattery):
    """See ``lightning_eff.testing.layers`` and ``lightning_eff.testing.precision``."""

    cases = CASES
    launch = staticmethod(functools.partial(run_ranks, init_group=False, timeout_s=100.0))


def test_every_row_has_a_case() -> None:
    rows = {name for name, info in METHODS.items() if info.kind == "precision"}
    quantized = {name for name in rows if issubclass(METHODS[name].load_mixin(), QuantizedPrecisionMixin)}
    assert {case.info.name for case in CASES} == quantized
    assert quantized >= {"luq4", "fp8", "fp8-delayed", "flexpoint16", "dfp16", "bf16-emulated"}
