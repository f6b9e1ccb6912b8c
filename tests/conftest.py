"""Seeds, time limits, turns, leak police and the life of the rank pool, for every test."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; ranks inherit it

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.harness.leaks import Snapshot
from tests.harness.limit import LIMIT_S, Limit
from tests.harness.ranks import close_pool
from tests.harness.seeds import FIXED_SEED, seed_everything, seed_of_the_day
from tests.harness.turns import Turns

pytest_plugins = ["pytester"]

hypothesis.settings.register_profile(
    "eff",
    deadline=None,  # the first call of a kernel compiles; the wall limit of the test is the limit
    max_examples=50,
    database=None,  # failures print the blob that reproduces them
    print_blob=True,
)
hypothesis.settings.load_profile("eff")


TURNS = pytest.StashKey[Turns]()
"""The turns of this process among several; absent where there is one process."""
LIMIT = pytest.StashKey[Limit]()
"""The time limit of the test that runs; absent where a person debugs."""
FOLDER = pytest.StashKey[Path]()
"""Where the processes take turns; known to the one that starts the others."""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Set the seed of the day for Hypothesis and for the processes that run the tests, time limits and turns."""
    os.environ.setdefault("EFF_SEED", str(seed_of_the_day()))  # one seed, also over midnight
    if getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(seed_of_the_day())
    if not config.option.usepdb:
        config.stash[LIMIT] = Limit(os.fdopen(os.dup(2), "w"))  # what is captured later goes elsewhere
    if worker := getattr(config, "workerinput", None):
        config.stash[TURNS] = Turns(Path(worker["eff_turns"]), config.stash[LIMIT].lift)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a process of pytest-xdist where to take turns with the others."""
    if FOLDER not in node.config.stash:
        node.config.stash[FOLDER] = Path(tempfile.mkdtemp(prefix="eff-turns-"))
    node.workerinput["eff_turns"] = str(node.config.stash[FOLDER])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that want to be alone: one process runs them in a row while the others wait."""
    items.sort(key=lambda item: not _is_alone(item))


def _is_alone(item: pytest.Item | None) -> bool:
    return item is not None and item.get_closest_marker("alone") is not None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Wait for a turn, and then start the clock of the test's time limit."""
    turns, limit = item.config.stash.get(TURNS, None), item.config.stash.get(LIMIT, None)
    if turns is not None:
        turns.begin(alone=_is_alone(item))
    if limit is not None:
        marker = item.get_closest_marker("timeout")
        limit.begin(marker.args[0] if marker else LIMIT_S)
    try:
        return (yield)
    finally:
        if turns is not None:
            turns.end(alone_next=_is_alone(nextitem))


def pytest_report_header() -> str:
    return f"seeds: fixed {FIXED_SEED}, of the day {seed_of_the_day()} (replay with EFF_SEED={seed_of_the_day()})"


def pytest_unconfigure(config: pytest.Config) -> None:
    close_pool()
    if turns := config.stash.get(TURNS, None):
        turns.close()
    if limit := config.stash.get(LIMIT, None):
        limit.close()
    if folder := config.stash.get(FOLDER, None):
        shutil.rmtree(folder, ignore_errors=True)


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


@pytest.fixture
def no_hook_is_left() -> Iterator[None]:
    """Nobody listens to optimizers after the test who did not before; Fabrics of earlier tests may still be there."""
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

    from lightning_eff.optim.steps import STEPS

    before = list(STEPS._live())
    yield
    assert all(listener in before for listener in STEPS._live())
    assert before or not _global_optimizer_pre_hooks
    assert before or not _global_optimizer_post_hooks
