"""Seeds, leak police and the life of the rank pool, for every test."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; ranks inherit it

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from tests.harness.leaks import Snapshot
from tests.harness.ranks import close_pool
from tests.harness.seeds import FIXED_SEED, seed_everything, seed_of_the_day

pytest_plugins = ["pytester"]

hypothesis.settings.register_profile(
    "eff",
    deadline=None,  # the first call of a kernel compiles; the wall limit of the test is the limit
    max_examples=50,
    database=None,  # failures print the blob that reproduces them
    print_blob=True,
)
hypothesis.settings.load_profile("eff")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis explores from the seed of the day unless the command line says otherwise."""
    if getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(seed_of_the_day())


def pytest_report_header() -> str:
    return f"seeds: fixed {FIXED_SEED}, of the day {seed_of_the_day()} (replay with EFF_SEED={seed_of_the_day()})"


def pytest_unconfigure() -> None:
    close_pool()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the fixed seed, whichever tests ran before it."""
    seed_everything(FIXED_SEED)


@pytest.fixture(params=[pytest.param(FIXED_SEED, id="fixed"), pytest.param(seed_of_the_day(), id="today")])
def seed(request: pytest.FixtureRequest) -> int:
    """For statistical tests: run once from the fixed seed and once from the seed of the day."""
    value: int = request.param
    seed_everything(value)
    return value


@pytest.fixture(autouse=True)
def _leak_police(_seeded: Any) -> Iterator[None]:
    before = Snapshot()
    yield
    if leaks := before.leaks():
        pytest.fail("this test leaks:\n  " + "\n  ".join(leaks), pytrace=False)
