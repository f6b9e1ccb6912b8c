"""The compiled rounding to small float formats against ``functional``: bit for bit."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.numerics import float_format as plain
from lightning_eff.functional.numerics.float_format import E4M3, E5M2, FloatFormat, FloatRounding, Infinity
from lightning_eff.kernels import float_format as compiled
from tests.bounds import lognormal
from tests.functional.numerics.formats import FORMATS, all_float16, name

pytestmark = pytest.mark.usefixtures("compiled_kernels")

SIZES = (0, 1, 2047, 2048, 2049, 40_000)
ROUNDINGS: tuple[FloatRounding, ...] = ("nearest", "stochastic")
INFINITIES: tuple[Infinity, ...] = ("propagate", "saturate")


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.5), expected.nan_to_num(0.5))
    number = ~expected.isnan()
    assert torch.equal(found.signbit()[number], expected.signbit()[number])


@pytest.mark.parametrize("fmt", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format_on_every_bfloat16_and_float16(fmt: FloatFormat, dtype: torch.dtype) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16) if dtype == torch.bfloat16 else all_float16().float()
    for rounding in ROUNDINGS:
        for infinity in INFINITIES:
            found = compiled.quantize(x, fmt, rounding=rounding, seed=11, infinity=infinity)
            assert_equal(found, plain.quantize(x, fmt, rounding=rounding, seed=11, infinity=infinity))
            y = x if fmt.nan_code is not None else x[x.isfinite()]
            codes = compiled.encode(y, fmt, rounding=rounding, seed=11, infinity=infinity)
            assert torch.equal(codes, plain.encode(y, fmt, rounding=rounding, seed=11, infinity=infinity))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sizes_dtypes_and_threads(size: int, dtype: torch.dtype, threads: int) -> None:
    x = lognormal(size).to(dtype)
    for rounding in ROUNDINGS:
        for fmt in (E4M3, E5M2):
            found = compiled.quantize(x, fmt, rounding=rounding, seed=2**64 - 3)
            assert_equal(found, plain.quantize(x, fmt, rounding=rounding, seed=2**64 - 3))
            codes = compiled.encode(x, fmt, rounding=rounding, seed=5)
            assert torch.equal(codes, plain.encode(x, fmt, rounding=rounding, seed=5))
            for to in (torch.float32, torch.bfloat16, torch.float64):
                assert_equal(compiled.quantize(x, fmt, dtype=to), plain.quantize(x, fmt, dtype=to))


@given(
    fmt=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**64 - 1),
    exponent=st.integers(-149, 126),
    rounding=st.sampled_from(ROUNDINGS),
)
def test_any_float32_is_rounded_alike(fmt: FloatFormat, seed: int, exponent: int, rounding: FloatRounding) -> None:
    generator = torch.Generator().manual_seed(seed % 2**63)
    x = torch.randn(300, generator=generator, dtype=torch.float64).mul(2.0**exponent).float()
    found = compiled.quantize(x, fmt, rounding=rounding, seed=seed)
    assert_equal(found, plain.quantize(x, fmt, rounding=rounding, seed=seed))


def test_views_and_the_global_generator() -> None:
    x = torch.randn(40, 60)
    for view in (x.t(), x[:, ::3], x[None].expand(2, 40, 60)):
        assert_equal(compiled.quantize(view, E4M3), plain.quantize(view, E4M3))
        codes = compiled.encode(view, E5M2, rounding="stochastic", seed=1)
        assert torch.equal(codes, plain.encode(view, E5M2, rounding="stochastic", seed=1))
    torch.manual_seed(8)
    first = compiled.quantize(x, E4M3, rounding="stochastic")
    torch.manual_seed(8)
    assert torch.equal(plain.quantize(x, E4M3, rounding="stochastic"), first)


@pytest.mark.parametrize("place", [0, 2047, 39_999])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_has_no_code_is_refused(place: int, bad: float, threads: int) -> None:
    x = torch.zeros(40_000)
    x[place] = bad
    for module in (plain, compiled):
        with pytest.raises(ConfigurationError, match="has no code"):
            module.encode(x, FloatFormat(3, 2))
        with pytest.raises(ConfigurationError, match="rounding="):
            module.encode(x, E4M3, rounding="up")
    assert bool(compiled.quantize(x, FloatFormat(3, 2))[place].isfinite()) is False


def test_without_the_library_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = lognormal(5000)
    fast = compiled.quantize(x, E4M3, rounding="stochastic", seed=3), compiled.encode(x, E5M2)
    monkeypatch.setattr("lightning_eff.kernels.operands.library", lambda: None)
    assert_equal(compiled.quantize(x, E4M3, rounding="stochastic", seed=3), fast[0])
    assert torch.equal(compiled.encode(x, E5M2), fast[1])
