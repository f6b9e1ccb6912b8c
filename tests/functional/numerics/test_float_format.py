"""Every format of up to eight bits: exhaustive tables, all float16 inputs against a float64 oracle, torch's casts."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.numerics.float_format import E4M3, E5M2, FloatFormat, decode, encode, quantize
from tests.bounds import bernstein, neighbours
from tests.functional.numerics.formats import FORMATS, all_float16, name

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=name)


def oracle(x: Tensor, fmt: FloatFormat) -> Tensor:
    """Nearest value in float64 by search; a tie goes to the even code, without mantissa bits to the larger."""
    values = fmt.table[: fmt.max_code + 1].double()
    a = x.double().abs().clamp(max=fmt.max)
    above = torch.searchsorted(values, a).clamp(max=values.numel() - 1)
    below = torch.where(values[above] == a, above, (above - 1).clamp(min=0))
    low, high = a - values[below], values[above] - a
    even = torch.where(below % 2 == 0, below, above)
    if fmt.mantissa_bits == 0 and fmt.exponent_bits > 0:
        even = torch.where(below == 0, below, above)
    code = torch.where(low < high, below, torch.where(high < low, above, even))
    return torch.copysign(values[code], x.double())


@every_format
def test_values_are_those_of_the_definition(fmt: FloatFormat) -> None:
    e, m, bias = fmt.exponent_bits, fmt.mantissa_bits, int(fmt.bias or 0)
    for code in range(1 << fmt.bits):
        sign, rest = divmod(code, 1 << (fmt.bits - 1))
        field, mantissa = divmod(rest, 1 << m)
        value = 2.0 ** (field - bias) * (1 + mantissa / 2**m) if field else 2.0 ** (1 - bias) * mantissa / 2**m
        if fmt.special == "ieee" and field == (1 << e) - 1:
            value = math.nan if mantissa else math.inf
        if fmt.special == "fn" and rest == (1 << (e + m)) - 1:
            value = math.nan
        found = float(fmt.table[code])
        assert math.isnan(found) if math.isnan(value) else found == (-value if sign else value)
    finite = fmt.table[fmt.table.isfinite()]
    assert finite.max() == fmt.max
    assert finite[finite > 0].min() == fmt.min_subnormal
    assert torch.equal(fmt.values, finite.unique())


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_code_survives_decoding_and_encoding(fmt: FloatFormat, dtype: torch.dtype) -> None:
    codes = torch.arange(1 << fmt.bits, dtype=torch.uint8)
    values = decode(codes, fmt, dtype=dtype)
    number = ~values.isnan()
    for rounding in ("nearest", "stochastic"):
        kept = encode(values[number], fmt, rounding=rounding, seed=7)
        assert torch.equal(kept, codes[number])
        same = quantize(values[number], fmt, rounding=rounding, seed=7)
        assert torch.equal(same, values[number])
        assert torch.equal(same.signbit(), values[number].signbit())
    if fmt.nan_code is not None:
        assert bool(decode(encode(values, fmt), fmt)[~number].isnan().all())


@every_format
def test_every_float16_rounds_to_the_nearest_value(fmt: FloatFormat) -> None:
    x = all_float16()
    finite, special = x[x.isfinite()].float(), x[~x.isfinite()].float()
    expected = oracle(finite, fmt)
    found = quantize(finite, fmt)
    assert torch.equal(found.double(), expected)
    assert torch.equal(found.signbit(), finite.signbit())
    assert torch.equal(decode(encode(finite, fmt), fmt).double(), expected)
    assert torch.equal(quantize(finite.double(), fmt), expected)
    kept = quantize(special, fmt)
    assert torch.equal(kept.nan_to_num(0.5), special.nan_to_num(0.5))
    saturated = quantize(special, fmt, infinity="saturate")
    assert torch.equal(saturated.isnan(), special.isnan())
    assert torch.equal(saturated[special.isinf()], torch.copysign(torch.tensor(fmt.max), special[special.isinf()]))


@pytest.mark.parametrize(
    ("fmt", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)], ids=["E4M3", "E5M2"]
)
def test_the_ocp_formats_are_those_of_torch(fmt: FloatFormat, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values, theirs = decode(codes, fmt), codes.view(dtype).float()
    assert torch.equal(values.isnan(), theirs.isnan())
    assert torch.equal(values.nan_to_num(0.5), theirs.nan_to_num(0.5))
    for numbers in (all_float16().float(), torch.randn(100_000) * torch.randn(100_000).mul(6).exp2()):
        x = numbers[numbers.abs() <= fmt.max]
        assert torch.equal(encode(x, fmt), x.to(dtype).view(torch.uint8))
        assert torch.equal(quantize(x, fmt), x.to(dtype).float())
    limits = torch.finfo(dtype)
    assert (fmt.max, fmt.min_normal) == (limits.max, limits.smallest_normal)


@pytest.mark.parametrize(
    ("fmt", "given", "expected"),
    [
        (E4M3, 1.0625, 1.0),
        (E4M3, 1.1875, 1.25),
        (E4M3, 17.0, 16.0),
        (E4M3, 2.0**-10, 0.0),
        (E4M3, 3 * 2.0**-10, 2.0**-8),
        (E4M3, 0.017, 0.017578125),
        (E4M3, 3.3, 3.25),
        (E4M3, 1e9, 448.0),
        (E5M2, 1.125, 1.0),
        (E5M2, 1.375, 1.5),
        (E5M2, 3.3, 3.5),
        (E5M2, 61439.0, 57344.0),
        (E5M2, 1e9, 57344.0),
    ],
)
def test_vectors(fmt: FloatFormat, given: float, expected: float) -> None:
    assert float(quantize(torch.tensor(given), fmt)) == expected
    assert float(quantize(torch.tensor(-given), fmt)) == -expected


def test_special_codes() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    assert encode(x, E5M2).tolist() == [0x7F, 0x7C, 0xFC, 0x80]
    assert encode(x, E4M3).tolist() == [0x7F, 0x7F, 0xFF, 0x80]
    assert encode(x, E4M3, infinity="saturate").tolist() == [0x7F, 0x7E, 0xFE, 0x80]
    assert encode(x[1:], FloatFormat(2, 1), infinity="saturate").tolist() == [7, 15, 8]
    for part, infinity in ((x[:1], "saturate"), (x[1:], "propagate")):
        with pytest.raises(ConfigurationError, match="has no code for it"):
            encode(part, FloatFormat(2, 1), infinity=infinity)  # type: ignore[arg-type]


@pytest.mark.parametrize("fmt", [E4M3, E5M2, FloatFormat(3, 0), FloatFormat(2, 1), FloatFormat(0, 7)], ids=name)
def test_stochastic_rounding_is_unbiased(fmt: FloatFormat, seed: int) -> None:
    points, draws = 64, 4000
    x = torch.cat([torch.rand(points // 2) * fmt.max, torch.rand(points // 2) * 3 * fmt.min_normal]).clamp(max=fmt.max)
    lower, upper = neighbours(x, fmt.values.double())
    found = quantize(x.expand(draws, points).contiguous(), fmt, rounding="stochastic", seed=seed).double()
    assert bool(((found == lower) | (found == upper)).all())
    variance, spread = (x.double() - lower) * (upper - x.double()), upper - lower
    bound = bernstein(variance, spread, draws, 2 * 5 * points) + spread * 2.0**-23  # 23 random bits
    assert bool(((found.mean(0) - x.double()).abs() <= bound).all())


def test_stochastic_rounding_draws_from_torch_and_follows_its_seed() -> None:
    x = torch.randn(1000)
    torch.manual_seed(4)
    first = quantize(x, E4M3, rounding="stochastic")
    torch.manual_seed(4)
    assert torch.equal(quantize(x, E4M3, rounding="stochastic"), first)
    assert not torch.equal(quantize(x, E4M3, rounding="stochastic"), first)
    codes = encode(x, E4M3, rounding="stochastic", seed=3)
    assert torch.equal(decode(codes, E4M3), quantize(x, E4M3, rounding="stochastic", seed=3))


def test_subnormal_float32_and_huge_values() -> None:
    x = torch.tensor([1e-45, -1e-40, 3.4e38, 0.0])
    for fmt in FORMATS:
        assert quantize(x, fmt).tolist() == [0.0, 0.0, fmt.max, 0.0]
    assert quantize(torch.tensor([1e300, 1e-300], dtype=torch.float64), E4M3).tolist() == [448.0, 0.0]


def test_dtypes_shapes_and_empty_tensors() -> None:
    x = torch.randn(4, 5, 6)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        part = x.to(dtype)[:, ::2].transpose(0, 2)
        found = quantize(part, E4M3, rounding="stochastic", seed=1)
        assert (found.dtype, found.shape) == (dtype, part.shape)
        assert torch.equal(found, quantize(part.contiguous(), E4M3, rounding="stochastic", seed=1))
    assert quantize(x.half(), E5M2, dtype=torch.float32).dtype == torch.float32
    assert quantize(torch.empty(0, 3), E4M3).shape == (0, 3)
    assert encode(torch.empty(0), E4M3, rounding="stochastic").numel() == 0
    assert quantize(torch.tensor(3.3, requires_grad=True), E4M3).requires_grad is False


@given(
    fmt=st.sampled_from(FORMATS),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=30),
    power=st.integers(-4, 4),
)
def test_rounding_is_monotone_odd_and_idempotent(fmt: FloatFormat, values: list[float], power: int) -> None:
    x = torch.tensor(sorted(values), dtype=torch.float32)
    found = quantize(x, fmt)
    assert bool((found.diff() >= 0).all())
    assert torch.equal(quantize(-x, fmt), -found)
    assert torch.equal(quantize(found, fmt), found)
    shifted = FloatFormat(fmt.exponent_bits, fmt.mantissa_bits, int(fmt.bias or 0) - power, fmt.special)
    exact = x[(x == 0) | ((x.abs() > 1e-30) & (x.abs() < 1e30))]
    assert torch.equal(quantize(exact * 2.0**power, shifted), quantize(exact, fmt) * 2.0**power)


@pytest.mark.parametrize(
    "arguments",
    [(0, 0), (4, 4), (8, 0), (-1, 3), (3, -1), (5, 2, 200), (5, 2, -100), (1, 0, None, "fn"), (1, 3, None, "ieee")],
)
def test_impossible_formats_are_refused(arguments: Any) -> None:
    with pytest.raises(ConfigurationError):
        FloatFormat(*arguments)


def test_unknown_choices_are_named() -> None:
    with pytest.raises(ConfigurationError, match="special='inf'"):
        FloatFormat(4, 3, special="inf")  # type: ignore[arg-type]
    for function in (quantize, encode):
        with pytest.raises(ConfigurationError, match="rounding='up'"):
            function(torch.ones(1), E4M3, rounding="up")  # type: ignore[operator]
        with pytest.raises(ConfigurationError, match="infinity='drop'"):
            function(torch.ones(1), E4M3, infinity="drop")  # type: ignore[operator]
