"""Codes of Flexpoint against a float64 oracle."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from lightning_eff.functional.numerics.flexpoint import (
    flex_codes,
    flex_quantize,
    integer_codes,
    round_to_scale,
)
from tests.bounds import bernstein

BITS = st.integers(4, 16)
FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=30)


def oracle(x: Tensor, scale: float, bits: int) -> Tensor:
    """The definition in float64, where nothing is rounded twice."""
    return (x.double() / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@given(values=FLOATS, bits=BITS, exponent=st.integers(-126, 100))
def test_the_codes_are_those_of_the_definition(values: list[float], bits: int, exponent: int) -> None:
    x, scale = torch.tensor(values), 2.0**exponent
    codes, kept = flex_codes(x, scale, bits=bits)
    assert codes.dtype == torch.int16
    assert kept.item() == scale
    assert torch.equal(codes.double(), oracle(x, scale, bits))
    symmetric = integer_codes(x, scale, bits=bits, symmetric=True).codes
    assert torch.equal(symmetric.double(), oracle(x, scale, bits).clamp(min=1 - 2 ** (bits - 1)))


@given(seed=st.integers(0, 2**31), bits=BITS, exponent=st.integers(-100, 80))
def test_the_error_is_half_a_unit_and_rounding_twice_changes_nothing(seed: int, bits: int, exponent: int) -> None:
    scale, top = 2.0**exponent, 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(200, generator=generator) * 2 - 1) * top * scale
    q = flex_quantize(x, scale, bits=bits)
    assert bool(((x.double() - q.double()).abs() <= scale / 2).all())
    assert torch.equal(flex_quantize(q, scale, bits=bits), q)
    assert torch.equal(flex_quantize(q, scale, bits=bits, rounding="stochastic", seed=seed), q)
    assert torch.equal(round_to_scale(x, scale, bits=bits), q)
    assert torch.equal(flex_quantize(x * 4, scale * 4, bits=bits), q * 4)


def test_ties_ends_and_zero() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.0, -0.0, 32767.4, 32767.6, -32768.4, -1e30, 3e38, 1e-45])
    codes = flex_codes(x, 1.0).codes
    assert codes.tolist() == [0, 2, 2, 0, -2, 0, 0, 32767, 32767, -32768, -32768, 32767, 0]
    assert integer_codes(x, 1.0, symmetric=True).codes.min() == -32767
    assert not flex_quantize(x, 1.0)[:7].signbit()[[3, 5, 6]].any()
    assert not round_to_scale(x, 1.0)[[3, 5, 6]].signbit().any()


def test_dtypes_shapes_and_scales() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(4, 6).to(dtype).t()
        for scale in (2.0**-12, torch.tensor(2.0**-12)):
            assert flex_codes(x, scale).codes.shape == (6, 4)
            assert flex_quantize(x, scale).dtype == round_to_scale(x, scale).dtype == dtype
            assert torch.equal(flex_quantize(x, scale), round_to_scale(x, scale))
    assert flex_codes(torch.empty(0, 3), 1.0).codes.shape == (0, 3)
    assert flex_codes(torch.tensor(3.0, requires_grad=True), 1.0).codes.item() == 3
    scale = torch.tensor(0.5)
    kept = flex_codes(torch.ones(2), scale).scale
    scale.fill_(8.0)
    assert kept == 0.5, "the codes keep the scale they were made with"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_tensor_stays_visible(bad: float) -> None:
    x = torch.tensor([1.0, bad])
    for rounding in ("nearest", "stochastic"):
        codes, scale = flex_codes(x, 0.5, rounding=rounding)  # type: ignore[arg-type]
        assert scale.isnan()
        assert codes.tolist() == [0, 0]
    assert flex_quantize(x, 0.5).isnan().all()
    assert flex_codes(torch.ones(2), bad).scale.isnan()
    rounded = round_to_scale(torch.tensor([1.3, bad]), 0.5)
    assert torch.equal(rounded.nan_to_num(7.0), torch.tensor([1.5, bad]).nan_to_num(7.0))
    assert round_to_scale(torch.ones(2), torch.nan).isnan().all()


def test_stochastic_rounding_is_unbiased(seed: int) -> None:
    points, draws, scale = 64, 4000, 2.0**-9
    x = (torch.rand(points) * 2 - 1) * 100 * scale
    x[:4] = torch.tensor([-128.0, 127.0, -127.5, 126.5]) * scale
    codes = flex_codes(x.expand(draws, points).contiguous(), scale, bits=8, rounding="stochastic", seed=seed).codes
    y = x.double() / scale
    low, share = y.floor(), y - y.floor()
    assert bool(((codes == low) | (codes == y.ceil())).all())
    ones = torch.ones(points, dtype=torch.float64)
    bound = bernstein(share * (1 - share), ones, draws, 2 * points) + 2.0**-23  # 23 random bits
    assert bool(((codes.double().mean(0) - y).abs() <= bound).all())


def test_stochastic_rounding_keeps_small_updates_that_rounding_to_nearest_loses(seed: int) -> None:
    weight, update, steps = torch.ones(4096), 2.0**-17, 40  # an eighth of a unit
    nearest = stochastic = flex_quantize(weight, 2.0**-14)
    for step in range(steps):
        nearest = flex_quantize(nearest + update, 2.0**-14)
        stochastic = flex_quantize(stochastic + update, 2.0**-14, rounding="stochastic", seed=seed * 100 + step)
    assert torch.equal(nearest, weight)
    moved = (stochastic.double() - 1).mean() * 2**14
    bound = bernstein(torch.tensor(7 / 64), torch.tensor(1.0), 4096 * steps, 2) * steps
    assert abs(moved - steps / 8) <= bound
    assert bound < 0.05 * steps


def test_stochastic_rounding_draws_from_torch_and_follows_its_seed() -> None:
    x = torch.randn(1000)
    torch.manual_seed(4)
    first = flex_codes(x, 0.25, rounding="stochastic").codes
    torch.manual_seed(4)
    assert torch.equal(flex_codes(x, 0.25, rounding="stochastic").codes, first)
    assert not torch.equal(flex_codes(x, 0.25, rounding="stochastic").codes, first)
