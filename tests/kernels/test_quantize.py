"""The compiled quantisers against ``functional``: bit for bit, at any size and number of threads."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lightning_eff import functional
from lightning_eff.functional.numerics.sawb import COEFFICIENTS, FLAT, Unsigned
from lightning_eff.kernels import compiler, quantize
from tests.bounds import lognormal

pytestmark = pytest.mark.usefixtures("compiled_kernels")

SIZES = (0, 1, 2, 3, 63, 2047, 2048, 2049, 4097, 32767, 32768, 32769, 100_003)  # blocks of 2048, threads from 32768
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_luq_codes_are_those_of_functional(size: int, dtype: torch.dtype, threads: int) -> None:
    if threads > 1 and size < 32767:
        return  # one thread works on these
    x = (lognormal(size) / 100).to(dtype).nan_to_num(posinf=1.0, neginf=-1.0)
    for levels in range(2, 9):
        for power_of_two in (False, True):
            seed = (levels * 0x9E3779B97F4A7C15 + size) % 2**64
            found = quantize.luq_codes(x, levels=levels, power_of_two=power_of_two, seed=seed)
            expected = functional.luq_codes(x, levels=levels, power_of_two=power_of_two, seed=seed)
            assert torch.equal(found.codes, expected.codes)
            assert found.codes.dtype == expected.codes.dtype
            assert torch.equal(found.scale, expected.scale)


def test_luq_codes_for_many_seeds() -> None:
    x = lognormal(5000)
    seeds = [*range(50), -1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, *torch.randint(2**62, (200,)).tolist()]
    for seed in seeds:
        assert torch.equal(quantize.luq_codes(x, seed=seed).codes, functional.luq_codes(x, seed=seed).codes)


@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-36, 1e-20, 1e20, 1e37])
def test_luq_codes_at_the_ends_of_float32(scale: float) -> None:
    x = (torch.rand(4096) * 2 - 1) * scale
    for levels in (2, 7):
        found, expected = (f(x, levels=levels, seed=4) for f in (quantize.luq_codes, functional.luq_codes))
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scale, expected.scale)


def test_the_maximum_maps_to_the_top_code() -> None:
    for x in torch.rand(20_000):
        codes, alpha = quantize.luq_codes(x, seed=1)
        assert codes == 64
        assert alpha * 64 == x


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2047, 2048, 39_999])
def test_non_finite_values_stay_visible(bad: float, place: int, threads: int) -> None:
    x = torch.randn(40_000)
    x[place] = bad
    codes, alpha = quantize.luq_codes(x, seed=0)
    assert alpha.isnan()
    assert not codes.any()
    for unsigned in (False, "mirror5", "reference"):
        quantised, packed, _ = quantize.sawb_encode(x.abs(), unsigned=unsigned, pack=True)
        assert quantised.scale.isnan()
        assert not quantised.codes.any()
        assert packed is not None
        assert not packed.any()
    assert not bool(quantize.largest_magnitude(x).isfinite())


def test_given_and_observed_maximum(threads: int) -> None:
    x, estimate = lognormal(50_000), torch.tensor(3.0)
    observed = torch.empty(())
    for levels in (7, 8):  # compiled, and not
        found = quantize.luq_codes(x, levels=levels, max_abs=estimate, seed=2, observed=observed)
        expected = functional.luq_codes(x, levels=levels, max_abs=estimate, seed=2)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scale, expected.scale)
        assert observed == x.abs().max()
        x = x * 2
    assert quantize.luq_codes(torch.tensor([torch.inf, 1.0]), max_abs=1.0, seed=2).codes.tolist() == [64, 64]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unsigned", [False, "mirror5", "reference"])
def test_sawb_codes_are_those_of_functional(size: int, dtype: torch.dtype, unsigned: Unsigned, threads: int) -> None:
    x = torch.randn(size).mul(3).to(dtype)
    x = x.relu() if unsigned else x
    codes, packed, is_unsigned = quantize.sawb_encode(x, unsigned=unsigned, pack=True)
    expected = functional.sawb_codes(x, unsigned=unsigned if is_unsigned else False, scale=codes.scale)
    assert torch.equal(codes.codes, expected.codes)
    assert packed is not None
    assert torch.equal(packed, functional.pack_int4(expected.codes))
    assert torch.equal(quantize.unpack_int4(packed, size, unsigned=is_unsigned).view(x.shape), codes.codes)
    assert is_unsigned == bool(unsigned and x.numel() and x.max() > 0)
    kind = unsigned if is_unsigned else False
    assert abs(float(codes.scale) - float(functional.sawb_scale(x, unsigned=kind))) <= scale_bound(x, kind)


def scale_bound(x: torch.Tensor, unsigned: Unsigned) -> float:
    """Rounding of the compiled scale: sums of 2048 squares in float32, against sums in float64.

    A sum of n positive float32 terms has a relative error below (n + 1) * 2^-24; the two terms of the formula cancel,
    so their absolute errors add.
    """
    x = x.double()[x > 0] if unsigned == "mirror5" else x.double().reshape(-1)
    if x.numel() == 0:
        return 0.0
    c1, c2 = COEFFICIENTS[unsigned or "signed"][4]
    relative = (min(x.numel(), 2048) + 3) * 2.0**-24
    spread = c1 * float(x.square().mean().sqrt()) + abs(c2) * float(x.abs().mean())
    return relative * spread / (7.5 if unsigned == "reference" else 15 if unsigned else 7)


@pytest.mark.parametrize("unsigned", [False, "mirror5", "reference"])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.full((n,), 0.3),
        lambda n: torch.randn(n).sigmoid(),
        lambda n: 1 + 0.4 * torch.rand(n),
        torch.zeros,
        lambda n: torch.rand(n) * 1e30,
        lambda n: torch.rand(n) * 3e38,
        lambda n: torch.rand(n) * 1e-25,
        lambda n: torch.rand(n) * 1e-41,
    ],
)
def test_scales_of_awkward_tensors(unsigned: Unsigned, make: Any) -> None:
    x = make(5000)
    codes, _, is_unsigned = quantize.sawb_encode(x, unsigned=unsigned)
    expected = functional.sawb_scale(x, unsigned=unsigned if is_unsigned else False)
    assert bool(codes.scale.isfinite())
    assert float(codes.scale) == pytest.approx(float(expected), rel=1e-3)
    largest = x.double().max()
    if largest > 1e-37:
        assert functional.sqnr_db(x.double() / largest, codes.dequantize(torch.float64) / largest) > 10


def test_the_two_versions_agree_on_what_is_flat() -> None:
    assert f"FLAT = {FLAT};" in next(s for s in compiler.SOURCES if s.name == "quantize.cpp").read_text()


@pytest.mark.parametrize("unsigned", [False, "mirror5", "reference"])
def test_a_single_negative_element_makes_codes_signed(unsigned: Unsigned) -> None:
    x = torch.rand(5000)
    assert quantize.sawb_encode(x, unsigned=unsigned)[2] is bool(unsigned)
    x[4999] = -1e-40
    assert quantize.sawb_encode(x, unsigned=unsigned)[2] is False
    x[4999] = -0.0
    assert quantize.sawb_encode(x, unsigned=unsigned)[2] is bool(unsigned)


def test_views_and_other_layouts() -> None:
    x = torch.randn(40, 60)
    for view in (x.t(), x[:, ::3], x[None].expand(2, 40, 60), x.view(2, 20, 60)):
        codes = quantize.sawb_encode(view)[0]
        assert torch.equal(codes.codes, quantize.sawb_encode(view.contiguous())[0].codes)
        assert torch.equal(quantize.luq_codes(view, seed=1).codes, functional.luq_codes(view, seed=1).codes)
    buffer = torch.full((5000,), 99, dtype=torch.int8)
    out = quantize.sawb_encode(x, out=buffer)[0].codes
    assert out.data_ptr() == buffer.data_ptr()
    assert bool((buffer[2400:] == 99).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_magnitude(dtype: torch.dtype, threads: int) -> None:
    for size in SIZES:
        x = torch.randn(size).to(dtype)
        assert quantize.largest_magnitude(x) == (x.abs().max().float() if size else 0.0)
        assert quantize.largest_magnitude(-x).dtype == torch.float32


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_unpacking_is_that_of_functional(size: int, unsigned: bool, threads: int) -> None:
    packed = torch.randint(0, 256, ((size + 1) // 2,), dtype=torch.uint8)
    expected = functional.unpack_int4(packed, size, unsigned=unsigned)
    assert torch.equal(quantize.unpack_int4(packed, size, unsigned=unsigned), expected)


def test_other_bits_and_negative_elements_take_the_torch_version() -> None:
    x = torch.randn(100)
    assert torch.equal(quantize.sawb_codes(x, bits=2).codes, functional.sawb_codes(x, bits=2).codes)
    unsigned = quantize.sawb_codes(x, unsigned="mirror5")
    assert torch.equal(unsigned.codes, functional.sawb_codes(x, unsigned="mirror5").codes)
    assert torch.equal(quantize.luq_quantize(x, seed=1), functional.luq_quantize(x, seed=1))
    assert quantize.sawb_quantize(x.double()).dtype == torch.float64


@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    dtype=st.sampled_from(DTYPES),
    levels=st.integers(2, 8),
    seed=st.integers(0, 2**64 - 1),
    exponent=st.integers(-150, 126),
    unsigned=st.sampled_from([False, "mirror5", "reference"]),
)
def test_any_tensor_is_quantised_alike(
    shape: list[int], dtype: torch.dtype, levels: int, seed: int, exponent: int, unsigned: Unsigned
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**63)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).mul(2.0**exponent).to(dtype)
    found, expected = (f(x, levels=levels, seed=seed) for f in (quantize.luq_codes, functional.luq_codes))
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale.isnan(), expected.scale.isnan())
    assert bool(found.scale.isnan()) or found.scale == expected.scale
    codes, _, is_unsigned = quantize.sawb_encode(x, unsigned=unsigned)
    kind = unsigned if is_unsigned else False
    assert torch.equal(codes.codes, functional.sawb_codes(x, unsigned=kind, scale=codes.scale).codes)
