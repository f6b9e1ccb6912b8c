"""Batteries of tests for methods: what every strategy, callback and precision promises, asked of one that is new.

A test module derives a class from a battery and gives it a case; ``docs/testing.md`` shows one. It needs pytest.
"""

from __future__ import annotations

from lightning_eff.testing.battery import Battery
from lightning_eff.testing.callbacks import CallbackBattery
from lightning_eff.testing.cases import CallbackCase, Case, PrecisionCase, Provocation, StrategyCase, collect_cases
from lightning_eff.testing.layers import QuantizedPrecisionBattery
from lightning_eff.testing.precision import PrecisionBattery
from lightning_eff.testing.ranks import RanksFailedError, close_ranks, run_ranks
from lightning_eff.testing.runs import Outcome, Plan
from lightning_eff.testing.strategies import StrategyBattery

__all__ = [
    "Battery",
    "CallbackBattery",
    "CallbackCase",
    "Case",
    "Outcome",
    "Plan",
    "PrecisionBattery",
    "PrecisionCase",
    "Provocation",
    "QuantizedPrecisionBattery",
    "RanksFailedError",
    "StrategyBattery",
    "StrategyCase",
    "close_ranks",
    "collect_cases",
    "run_ranks",
]
