"""Ranks of a benchmark: what rank 0 returns comes back, and no process is left behind."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from benchmarks._ranks import launch, run_on_ranks


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """The harness's own ranks may live through the test."""
    before = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= before


def _sum(number: int) -> tuple[int, float, int, str]:
    total = torch.tensor(float(number * (1 + dist.get_rank())))
    dist.all_reduce(total)
    return dist.get_rank(), float(total), torch.get_num_threads(), os.environ["WORLD_SIZE"]


@pytest.mark.long
def test_the_result_of_rank_0() -> None:
    assert run_on_ranks(_sum, 2, 5) == (0, 15.0, 1, "2")


def _break(number: int) -> Iterator[int]:
    yield number
    raise RuntimeError(f"broken on purpose, {number}")


@pytest.mark.long
def test_a_broken_rank_ends_the_run() -> None:
    with pytest.raises(Exception, match="broken on purpose, 7"):
        list(launch(_break, 1, 7))


def _endless() -> Iterator[int]:
    while True:
        dist.barrier()
        yield dist.get_rank()


@pytest.mark.long
def test_a_caller_that_wants_no_more_ends_the_ranks() -> None:
    before = len(multiprocessing.active_children())
    found = launch(_endless, 2)
    assert next(found) == 0
    assert len(multiprocessing.active_children()) == before + 2
    found.close()  # type: ignore[attr-defined]
