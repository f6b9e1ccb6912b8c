"""bfloat16 against torch's own rounding, exhaustively where it can be; means against the draws' own variance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_eff.functional.numerics.bf16 import bf16_round, bf16_stochastic_round, join_fp32, kahan_step, split_fp32
from tests.bounds import bernstein

PREFIXES = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16  # every bfloat16 as the upper half of a float32


def from_bits(*bits: int) -> Tensor:
    return torch.tensor([b - (1 << 32) if b >= 1 << 31 else b for b in bits], dtype=torch.int32).view(torch.float32)


def bits_of(x: Tensor) -> Tensor:
    return x.view(torch.int16 if x.dtype is torch.bfloat16 else torch.int32)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, any NaN being as good as another."""
    return bool(((bits_of(a) == bits_of(b)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_rounding_is_torchs_on_every_prefix(low: int) -> None:
    x = (PREFIXES | low).view(torch.float32)
    assert same(bf16_round(x), x.to(torch.bfloat16).float())


def test_rounding_is_torchs_on_random_patterns(seed: int) -> None:
    x = torch.randint(-(2**31), 2**31, (500_000,)).to(torch.int32).view(torch.float32)
    assert same(bf16_round(x), x.to(torch.bfloat16).float())


def test_rounding_of_known_patterns() -> None:
    given = from_bits(0x3F808000, 0x3F818000, 0x3F808001, 0x40490FDB, 0x7F7F7FFF, 0x7F7F8000, 0x7F800001, 0x00012345)
    rounded = [b & 0xFFFFFFFF for b in bits_of(bf16_round(given)).tolist()]
    expected = (0x3F80, 0x3F82, 0x3F81, 0x4049, 0x7F7F, 0x7F80, 0x7FC0, 0x0001)
    assert rounded == [b << 16 for b in expected]


def test_rounding_widens_and_keeps_the_shape() -> None:
    x = torch.randn(3, 4, dtype=torch.float64).t()
    assert bf16_round(x).dtype is torch.float32
    assert torch.equal(bf16_round(x), x.float().to(torch.bfloat16).float())
    assert bf16_round(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("share", [0.0, 2**-16, 0.25, 0.375, 0.5, 1 - 2**-16])
@pytest.mark.parametrize("start", [1.0, -1.0, 2.0**-120, -3.0e38])
def test_stochastic_rounding_is_right_in_the_mean(share: float, start: float, seed: int) -> None:
    n, bits = 200_000, int(bits_of(torch.tensor([start])))
    lower = torch.tensor([bits & -0x10000], dtype=torch.int32)
    x, lower, upper = ((b).view(torch.float32).double() for b in (lower + round(share * 65536), lower, lower + 0x10000))
    rounded = bf16_stochastic_round(x.float().expand(n), seed).double()
    assert bool(((rounded == lower) | (rounded == upper)).all())
    up = (rounded == upper).double().mean()
    variance = torch.tensor(share * (1 - share))
    assert abs(float(up) - share) <= float(bernstein(variance, torch.tensor(1.0), n, 48))
    if share == 0.375:  # the variance itself: p (1 - p) ulp^2, estimated from the same draws
        ulp, mean = float((upper - lower).abs()), rounded.mean()
        estimate = float(((rounded - mean) / ulp).square().mean())
        assert estimate == pytest.approx(0.375 * 0.625, rel=7 * 0.52 / math.sqrt(n))  # 7 standard errors


def test_stochastic_rounding_leaves_what_is_a_bfloat16(seed: int) -> None:
    every = PREFIXES.view(torch.float32)
    assert same(bf16_stochastic_round(every, seed), every.to(torch.bfloat16))


def test_stochastic_rounding_keeps_nan_inf_and_never_overflows(seed: int) -> None:
    broken = from_bits(0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F80FFFF, 0xFF800001).repeat(1000)
    assert bool(bf16_stochastic_round(broken, seed).isnan().all())
    infinite = torch.tensor([torch.inf, -torch.inf]).repeat(1000)
    assert torch.equal(bf16_stochastic_round(infinite, seed).float(), infinite)
    large = from_bits(0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000, 0x7F7F0001).repeat(1000)
    rounded = bf16_stochastic_round(large, seed).float()
    assert torch.equal(rounded.abs(), torch.full_like(large, torch.finfo(torch.bfloat16).max))
    assert torch.equal(rounded.sign(), large.sign())


def test_stochastic_rounding_is_a_function_of_its_seed() -> None:
    x = torch.randn(5000)
    assert torch.equal(bf16_stochastic_round(x, 5), bf16_stochastic_round(x, 5))
    assert not torch.equal(bf16_stochastic_round(x, 5), bf16_stochastic_round(x, 6))


@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_split_and_join_on_every_prefix(low: int) -> None:
    check_split((PREFIXES | low).view(torch.float32))


def test_split_and_join_on_random_patterns(seed: int) -> None:
    check_split(torch.randint(-(2**31), 2**31, (500_000,)).to(torch.int32).view(torch.float32))


def test_split_and_join_at_the_end_of_the_range() -> None:
    """Cutting instead of rounding from 0x7F7F8000 on would give these the codes of 0x7F7E8000 to 0x7F7EFFFF."""
    top = torch.arange(0x7F7D0000, 0x7F820000, dtype=torch.int64)
    check_split(top.to(torch.int32).view(torch.float32))
    check_split(-top.to(torch.int32).view(torch.float32))


def check_split(x: Tensor) -> None:
    hi, lo = split_fp32(x)
    back = join_fp32(hi, lo)
    assert (hi.dtype, lo.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(hi.isnan(), x.isnan())
    signalling = x.isnan() & ((bits_of(x) & 0x400000) == 0)
    expected = torch.where(signalling, bits_of(x) | 0x400000, bits_of(x))
    assert torch.equal(bits_of(back), expected)
    nearest = x.to(torch.bfloat16)
    tie = (bits_of(x) & 0xFFFF) == 0x8000
    assert bool((tie | x.isnan() | (bits_of(hi) == bits_of(nearest))).all())
    finite = hi.isfinite()
    error = (hi.double() - x.double()).abs()[finite]
    assert torch.equal(error, (nearest.double() - x.double()).abs()[finite]), "a nearest bfloat16"


def test_split_of_nothing_and_of_strided_tensors() -> None:
    x = torch.randn(4, 6).t()
    hi, lo = split_fp32(x)
    assert torch.equal(join_fp32(hi, lo), x)
    assert join_fp32(*split_fp32(torch.empty(0))).shape == (0,)


@pytest.mark.parametrize("step", [1e-3, -1e-3, 3e-4])
def test_kahan_follows_the_exact_sum(step: float) -> None:
    weight, rest = torch.full((4,), 1.5, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16)
    for _ in range(1000):
        weight, rest = kahan_step(weight, rest, torch.full((4,), step))
    exact = 1.5 + 1000 * step
    ulp = 2.0 ** (math.floor(math.log2(abs(exact))) - 7)
    assert bool(((weight.double() + rest.double() - exact).abs() <= ulp).all())
    assert bool(((weight.double() - exact).abs() <= 1.5 * ulp).all())


def test_kahan_known_answer() -> None:
    weight, rest = torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    for _ in range(1000):
        weight, rest = kahan_step(weight, rest, torch.tensor([1e-3]))
    assert weight.item() == 2.0
    assert abs((weight.float() + rest.float()).item() - 2.0032) < 5e-4


def test_kahan_with_a_float32_rest_is_tight() -> None:
    """The bound of the compensation's own rounding: with more bits in it the error is gone."""
    weight, rest = torch.ones(1, dtype=torch.bfloat16), torch.zeros(1)
    for _ in range(1000):
        d = 1e-3 + rest
        new = (weight.float() + d).to(torch.bfloat16)
        weight, rest = new, d - (new.float() - weight.float())
    assert abs((weight.float() + rest).item() - 2.0) < 1e-5


def test_kahan_does_not_keep_a_broken_rest() -> None:
    weight = torch.tensor([1.0, 3.3e38, torch.nan], dtype=torch.bfloat16)
    new, rest = kahan_step(weight, torch.zeros_like(weight), torch.tensor([torch.inf, 1e38, 1.0]))
    assert new.isfinite().tolist() == [False, False, False]
    assert rest.tolist() == [0.0, 0.0, 0.0]
