"""Streams of random numbers that do not depend on where a stage runs, and generators that ranks share."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from lightning_eff.runtime.rng import USER, Randomness, broadcast_generators, seed_of_run
from tests.harness import run_ranks

CPU = torch.device("cpu")


def drawn() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002 - what third parties draw from


def test_a_stream_does_not_depend_on_what_was_drawn_before() -> None:
    streams, found = Randomness(5, CPU), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        with streams.of(3, USER):
            found.append(drawn())
        with streams.of(3, 0):
            found.append((float(torch.rand(())),))  # type: ignore[arg-type]
    assert found[:2] == found[2:]


@pytest.mark.parametrize("stage", [USER, 0])
def test_outside_everything_is_as_if_nothing_had_been_drawn(stage: int) -> None:
    before = torch.get_rng_state()
    expected = drawn()
    torch.set_rng_state(before)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = (expected[0], random.random(), float(np.random.rand()))  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002

    def draw_and_fail() -> None:
        with Randomness(5, CPU).of(0, stage):
            torch.rand(100)
            if stage == USER:
                drawn()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        draw_and_fail()
    assert drawn() == expected


def test_every_micro_batch_and_stage_has_its_own() -> None:
    seen = []
    for seed in (0, 1, 2**64 - 1):
        for micro_batch in range(8):
            for stage in range(-1, 6):
                with Randomness(seed, CPU).of(micro_batch, stage):
                    seen.append(tuple(torch.randint(0, 2**31, (3,)).tolist()))
    assert len(set(seen)) == len(seen) == 3 * 8 * 7


def test_the_stream_inside_another_leaves_it_as_it_was() -> None:
    streams = Randomness(5, CPU)
    with streams.of(0, USER):
        expected = drawn(), drawn()
    with streams.of(0, USER):
        first = drawn()
        with streams.of(0, 3):
            torch.rand(7)
        assert (first, drawn()) == expected


def test_a_runs_seed_is_that_of_torch_and_drawing_it_draws_nothing() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert seed_of_run() == seed_of_run()
    assert torch.equal(torch.get_rng_state(), before)
    one = seed_of_run()
    torch.manual_seed(8)
    assert seed_of_run() != one


def _draw(rank: int, world: int) -> Any:
    import random

    import numpy as np

    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)  # noqa: NPY002 - what third parties draw from
    broadcast_generators()
    return float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002


def test_all_ranks_draw_what_rank_0_draws() -> None:
    first, second = run_ranks(_draw, 2)
    assert first == second
