"""The random bits: uniform, unrelated between neighbours, rows and seeds, and a function of seed and position alone."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_eff.functional import draw_seed, uniform_bits
from lightning_eff.functional.random import GOLDEN64, MASK64, ROW, mix32, mix64, rank_seed, uniform
from tests.bounds import FALSE_ALARM, chi_square, chi_square_bound, correlation, correlation_bound
from tests.harness import run_ranks

N = 1 << 20


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_is_uniform(shift: int, seed: int) -> None:
    bits = uniform_bits(N, seed)
    counts = torch.bincount((bits >> shift) & 0xFF, minlength=256)
    assert chi_square(counts) < chi_square_bound(255, 8)


def test_uniform_numbers_fill_the_interval(seed: int) -> None:
    u = uniform(N, seed)
    assert u.min() >= 0
    assert u.max() < 1
    assert torch.equal(u, (u * 2**23).round() / 2**23)  # 23 bits, so that the compiled kernels can compare integers
    assert chi_square(torch.histc(u, bins=1000, min=0, max=1)) < chi_square_bound(999, 2)


def test_bits_are_balanced_in_every_position(seed: int) -> None:
    bits = uniform_bits(N, seed)
    ones = torch.stack([((bits >> k) & 1).sum() for k in range(32)]).double()
    bound = math.sqrt(math.log(2 * 64 / FALSE_ALARM) / (2 * N))  # Hoeffding
    assert float((ones / N - 0.5).abs().max()) < bound


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 64, 1000, ROW - 1, ROW, ROW + 1, 2 * ROW])
def test_neighbours_are_uncorrelated(lag: int, seed: int) -> None:
    u = uniform(N, seed)
    assert abs(correlation(u[:-lag], u[lag:])) < correlation_bound(N - lag, 20)


@pytest.mark.parametrize("step", [1, 2, 3, 1 << 16, 1 << 31, 1 << 32, 1 << 40, (1 << 32) + 1])
def test_seeds_of_a_counter_are_uncorrelated(step: int, seed: int) -> None:
    u, v = uniform(N, seed), uniform(N, seed + step)
    assert abs(correlation(u, v)) < correlation_bound(N, 16)


def test_no_two_rows_of_neighbouring_seeds_are_alike(seed: int) -> None:
    """2^26 words, 64 seeds of 64 rows: no first word is seen twice as often as chance has it."""
    first = torch.stack([uniform_bits(64 * ROW, seed + s).view(64, ROW)[:, :2] for s in range(64)]).reshape(-1, 2)
    words = first[:, 0].long() << 32 | (first[:, 1].long() & 0xFFFFFFFF)
    assert words.unique().numel() == words.numel()  # chance of a collision of 64 bits among 4096: 5e-13


def test_mixing_is_a_bijection() -> None:
    step = 1 << 12  # a sample of 2^20 of all inputs, and a dense stretch
    for inputs in (torch.arange(-(2**31), 2**31, step), torch.arange(1 << 20)):
        assert mix32(inputs.to(torch.int32)).unique().numel() == inputs.numel()


def test_bits_depend_on_seed_and_position_alone() -> None:
    long = uniform_bits(3 * ROW + 5, 12345)
    for n in (0, 1, ROW - 1, ROW, ROW + 1):
        assert torch.equal(uniform_bits(n, 12345), long[:n])
    assert torch.equal(uniform_bits(ROW, -1), uniform_bits(ROW, 2**64 - 1))
    assert not torch.equal(uniform_bits(ROW, 1 << 32), uniform_bits(ROW, 1 << 33))  # the high word counts


def test_numbers_of_this_version() -> None:
    """The stream is part of what a checkpoint resumes: a change of it must be seen."""
    assert uniform_bits(3, 0)[1:].tolist() != uniform_bits(3, 1)[1:].tolist()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    uniform_bits(10_000, 3)
    assert torch.equal(torch.get_rng_state(), state)  # draws nothing from torch


def test_draw_seed_follows_manual_seed() -> None:
    torch.manual_seed(11)
    first = [draw_seed() for _ in range(4)]
    torch.manual_seed(11)
    assert [draw_seed() for _ in range(4)] == first
    assert len(set(first)) == 4
    assert all(0 <= s < 2**64 for s in first)


def test_rank_seed_without_a_group_keeps_the_seed() -> None:
    assert rank_seed(77) == 77
    assert rank_seed(2**64 + 3) == 3


def _seeds(rank: int, world_size: int) -> tuple[int, int]:
    torch.manual_seed(3)
    return rank_seed(77), draw_seed()


def test_ranks_seeded_alike_draw_different_seeds() -> None:
    (fixed_0, drawn_0), (fixed_1, drawn_1) = run_ranks(_seeds)
    assert fixed_0 == 77
    assert len({fixed_0, fixed_1, drawn_0, drawn_1}) == 4
    u, v = uniform(N, drawn_0), uniform(N, drawn_1)
    assert abs(correlation(u, v)) < correlation_bound(N, 1)


def test_mix64_is_splitmix64() -> None:
    """The first numbers of that generator with the seed 1234567."""
    found = [mix64(1234567 + k * GOLDEN64) for k in range(1, 6)]
    assert found == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_mix64_takes_any_integer_and_half_of_its_bits_follow_every_bit(seed: int) -> None:
    assert mix64(-1) == mix64(MASK64) == mix64((1 << 70) - 1)
    starts = [(seed + k * GOLDEN64) & MASK64 for k in range(2000)]
    assert len({mix64(z) for z in starts}) == len(starts)
    for bit in range(64):
        moved = sum((mix64(z) ^ mix64(z ^ (1 << bit))).bit_count() for z in starts[:200])
        assert 0.45 < moved / (200 * 64) < 0.55
