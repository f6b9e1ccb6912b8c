"""The compiled shared-exponent integers against ``functional``: bit for bit, and what they say about broken tensors."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.codes import Codes
from lightning_eff.functional.numerics.dfp16 import dfp_codes
from lightning_eff.functional.numerics.flexpoint import IntegerRounding, flex_quantize, integer_codes, round_to_scale
from lightning_eff.kernels.shared_exponent import dfp_encode, integer_encode, round_to_scale_
from tests.bounds import lognormal

pytestmark = pytest.mark.usefixtures("compiled_kernels")

SIZES = (0, 1, 2047, 2048, 2049, 40_000)
ROUNDINGS: tuple[IntegerRounding, ...] = ("nearest", "stochastic")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_eff.kernels.operands.library", lambda: None)


def bits_of(x: Tensor) -> Tensor:
    """What tells -0 from 0 and one NaN from another."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_codes(found: Codes, expected: Codes) -> None:
    assert found.codes.dtype == torch.int16
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale.nan_to_num(7.0), expected.scale.nan_to_num(7.0))
    assert found.scale.shape == ()


def all_bfloat16() -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------- the codes
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_sizes_dtypes_and_threads(size: int, dtype: torch.dtype, symmetric: bool, threads: int) -> None:
    x = lognormal(size).clamp(-6e4, 6e4).to(dtype)
    for bits in (4, 8, 13, 16):
        for rounding in ROUNDINGS:
            scale, observed = torch.tensor(2.0**-6), torch.tensor(-1.0)
            arguments = {"bits": bits, "symmetric": symmetric, "rounding": rounding, "seed": 2**64 - 3}
            found = integer_encode(x, scale, observed=observed, **arguments)  # type: ignore[arg-type]
            assert_codes(found, integer_codes(x, scale, **arguments))  # type: ignore[arg-type]
            assert observed == (x.float().abs().max() if size else 0)


@given(
    seed=st.integers(0, 2**64 - 1),
    exponent=st.integers(-149, 126),
    offset=st.integers(-20, 6),
    bits=st.integers(4, 16),
    symmetric=st.booleans(),
    rounding=st.sampled_from(ROUNDINGS),
)
def test_any_float32_is_rounded_alike(
    seed: int, exponent: int, offset: int, bits: int, symmetric: bool, rounding: IntegerRounding
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**63)
    x = torch.randn(300, generator=generator, dtype=torch.float64).mul(2.0**exponent).float()
    scale = torch.tensor(2.0 ** min(max(exponent + offset, -126), 100))
    if not x.isfinite().all():
        x = x.nan_to_num(1.0)
    expected = integer_codes(x, scale, bits=bits, symmetric=symmetric, rounding=rounding, seed=seed)
    assert_codes(integer_encode(x, scale, bits=bits, symmetric=symmetric, rounding=rounding, seed=seed), expected)
    rounded = round_to_scale(x, scale, bits=bits)
    assert torch.equal(bits_of(round_to_scale_(x, scale, bits=bits)), bits_of(rounded))


@pytest.mark.parametrize("exponent", [-126, -120, -14, 0, 90, 100])
def test_every_bfloat16_at_the_ends_of_the_scales(exponent: int) -> None:
    x, scale = all_bfloat16(), torch.tensor(2.0**exponent)
    finite = x[x.isfinite()]
    for dtype in (torch.bfloat16, torch.float32):
        for bits in (8, 16):
            for rounding in ROUNDINGS:
                expected = integer_codes(finite, scale, bits=bits, rounding=rounding, seed=5)
                found = integer_encode(finite.to(dtype), scale, bits=bits, rounding=rounding, seed=5)
                assert_codes(found, expected)
            rounded = round_to_scale(x.to(dtype), scale, bits=bits)
            found = round_to_scale_(x.to(dtype), scale, bits=bits)
            assert torch.equal(found.isnan(), rounded.isnan())
            assert torch.equal(bits_of(found.nan_to_num(7.0)), bits_of(rounded.nan_to_num(7.0)))


def test_ties_and_saturation() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 32767.4, 32767.6, 1e30, -32768.4, -3e38, -0.0])
    codes = integer_encode(x, torch.tensor(1.0)).codes
    assert codes.tolist() == [0, 2, 2, 0, 32767, 32767, 32767, -32768, -32768, 0]
    assert integer_encode(x, torch.tensor(1.0), symmetric=True).codes.min() == -32767


def test_buffers_and_scales_are_the_callers() -> None:
    x, scale = torch.randn(5, 7), torch.tensor(2.0**-12)
    out = torch.full((50,), 9, dtype=torch.int16)
    codes, kept = integer_encode(x, scale, out=out)
    assert codes.data_ptr() == out.data_ptr()
    assert codes.shape == (5, 7)
    assert out[35:].tolist() == [9] * 15
    scale.fill_(4.0)
    assert kept == 2.0**-12, "the codes keep the scale they were made with"


def test_views_and_the_global_generator() -> None:
    x, scale = torch.randn(40, 60), torch.tensor(2.0**-9)
    for view in (x.t(), x[:, ::3], x[None].expand(2, 40, 60)):
        assert_codes(integer_encode(view, scale), integer_codes(view, scale))
        expected = integer_codes(view, scale, rounding="stochastic", seed=1)
        assert_codes(integer_encode(view, scale, rounding="stochastic", seed=1), expected)
    torch.manual_seed(8)
    first = integer_encode(x, scale, rounding="stochastic")
    torch.manual_seed(8)
    assert_codes(integer_codes(x, scale, rounding="stochastic"), first)
    state = torch.get_rng_state()
    integer_encode(x, scale)
    assert torch.equal(torch.get_rng_state(), state), "rounding to nearest draws nothing"


# --------------------------------------------------------------------------------------------------- rounding in place
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_in_place(size: int, dtype: torch.dtype, threads: int) -> None:
    x, scale, observed = lognormal(size).clamp(-6e4, 6e4).to(dtype), torch.tensor(2.0**-9), torch.tensor(-1.0)
    largest, expected, version = x.float().abs().max() if size else 0, flex_quantize(x, scale), x._version
    assert round_to_scale_(x, scale, observed=observed) is x
    assert torch.equal(bits_of(x), bits_of(expected))
    assert observed == largest
    assert x._version > version


def test_rounding_a_view_writes_through_it() -> None:
    x, scale = torch.randn(6, 8), torch.tensor(0.25)
    expected = x.clone()
    expected[:, ::2] = flex_quantize(x[:, ::2], scale)
    round_to_scale_(x[:, ::2], scale)
    assert torch.equal(x, expected)


def test_autograd_notices_the_write() -> None:
    x = torch.randn(5, requires_grad=True)
    y = x.exp()
    round_to_scale_(y, torch.tensor(0.25))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_tensors_are_rounded_too() -> None:
    with torch.inference_mode():
        x = torch.tensor([0.3, 0.4])
        assert round_to_scale_(x, torch.tensor(0.25)).tolist() == [0.25, 0.5]


# --------------------------------------------------------------------------------------------------------------- DFP-16
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dfp_codes_are_those_of_functional(size: int, dtype: torch.dtype, threads: int) -> None:
    x = lognormal(size).clamp(-6e4, 6e4).to(dtype)
    out = torch.empty(size, dtype=torch.int16)
    for bits in (8, 14, 16):
        assert_codes(dfp_encode(x, bits=bits), dfp_codes(x, bits=bits))
        assert dfp_encode(x, bits=bits, out=out).codes.data_ptr() == out.data_ptr()


@given(seed=st.integers(0, 2**31), exponent=st.integers(-149, 127))
def test_dfp_codes_of_any_magnitude(seed: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(100, generator=generator, dtype=torch.float64) * 2.0**exponent).float()
    assert_codes(dfp_encode(x), dfp_codes(x))


# ------------------------------------------------------------------------------------------------------ broken tensors
@pytest.mark.parametrize("place", [0, 2047, 39_999])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_damage_is_seen_and_not_spread(place: int, bad: float, dtype: torch.dtype, threads: int) -> None:
    x, scale = torch.randn(40_000).to(dtype), torch.tensor(2.0**-12)
    x[place] = bad
    for rounding in ROUNDINGS:
        observed = torch.tensor(0.0)
        codes, kept = integer_encode(x, scale, rounding=rounding, observed=observed)
        assert kept.isnan()
        assert not codes.any()
        assert observed.isnan() if math.isnan(bad) else observed == math.inf
    assert dfp_encode(x).scale.isnan()
    expected = flex_quantize(x.nan_to_num(0.0, 0.0, 0.0), scale)
    expected[place] = bad
    observed = torch.tensor(0.0)
    round_to_scale_(x, scale, observed=observed)
    assert torch.equal(x.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert not observed.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FFFFFFF, -1])
def test_a_broken_scale_is_seen(dtype: torch.dtype, payload: int) -> None:
    scale = torch.tensor(payload, dtype=torch.int32).view(torch.float32)
    x = torch.randn(100).to(dtype)
    codes, kept = integer_encode(x, scale)
    assert kept.isnan()
    assert not codes.any()
    assert round_to_scale_(x, scale).isnan().all()


# ----------------------------------------------------------------------------------------------- without, and refusals
def test_without_the_library_the_numbers_are_the_same(no_library: None) -> None:
    """What the tests above find equal to ``functional`` is also what comes back when nothing is compiled."""
    x, scale, observed = lognormal(5000), torch.tensor(2.0**-10), torch.tensor(0.0)
    out = torch.empty(6000, dtype=torch.int16)
    found = integer_encode(x, scale, rounding="stochastic", seed=3, out=out, observed=observed)
    assert_codes(found, integer_codes(x, scale, rounding="stochastic", seed=3))
    assert found.codes.data_ptr() == out.data_ptr()
    assert observed == x.abs().max()
    assert_codes(dfp_encode(x), dfp_codes(x))
    expected, observed = flex_quantize(x, scale), torch.tensor(0.0)
    largest, version = x.abs().max(), x._version
    assert round_to_scale_(x, scale, observed=observed) is x
    assert torch.equal(bits_of(x), bits_of(expected))
    assert observed == largest
    assert x._version > version
    broken = torch.tensor([1.3, math.nan, -math.inf])
    assert integer_encode(broken, scale, observed=observed).scale.isnan()
    assert observed.isnan()
    assert round_to_scale_(broken, torch.tensor(0.5)).nan_to_num(7.0, neginf=-7.0).tolist() == [1.5, 7.0, -7.0]


def test_unknown_choices_are_named() -> None:
    x, scale = torch.ones(1), torch.tensor(1.0)
    with pytest.raises(ConfigurationError, match="rounding='up'"):
        integer_encode(x, scale, rounding="up")  # type: ignore[arg-type]
    for bits in (3, 17):
        for function in (integer_encode, round_to_scale_):
            with pytest.raises(ConfigurationError, match="bits="):
                function(x, scale, bits=bits)  # type: ignore[operator]
        with pytest.raises(ConfigurationError, match="bits="):
            dfp_encode(x, bits=bits)
