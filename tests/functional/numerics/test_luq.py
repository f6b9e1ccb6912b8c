"""LUQ value by value: the published vectors, the codebook, edge cases, and what must not depend on anything."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lightning_eff.errors import ConfigurationError
from lightning_eff.functional import (
    GRADIENT_ROUNDINGS,
    HindsightMax,
    fnt_learning_rate,
    luq_codes,
    luq_quantize,
    luq_scale,
    smp_quantize,
)
from lightning_eff.functional.codes import TINY
from lightning_eff.functional.numerics.luq import _inverse, round_to_powers
from tests.bounds import codebook, lognormal

VECTOR = [0, 1, -1, 0.75, 0.6, -0.3, 0.1, 0.02, -0.01, 0.001]
UNIFORM = [0.5, 0.5, 0.5, 0.3, 0.3, 0.1, 0.7, 0.2, 0.9, 0.05]
EXPECTED = {
    7: [0, 1, -1, 1, 0.5, -0.5, 0.0625, 0.03125, 0, 0.015625],
    8: [0, 1, -1, 1, 0.5, -0.5, 0.0625, 0.03125, -0.0078125, 0.0078125],
}
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("levels", [7, 8])
def test_published_vector(levels: int) -> None:
    x, alpha = torch.tensor(VECTOR), 2.0 ** (1 - levels)
    rounded = round_to_powers(x.abs() / alpha, torch.tensor(UNIFORM)) * alpha * x.sign()
    assert rounded.tolist() == EXPECTED[levels]


@pytest.mark.parametrize("levels", range(2, 9))
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_are_of_the_codebook(levels: int, dtype: torch.dtype) -> None:
    x = (lognormal(20_000) / 64).to(dtype)
    x = x[x.isfinite()]
    x = torch.cat([x, -x])  # both signs reach the top
    codes, alpha = luq_codes(x, levels=levels, seed=1)
    allowed = {0, *(sign * 2**k for k in range(levels) for sign in (-1, 1))}
    assert set(codes.unique().tolist()) == allowed
    assert alpha.item() == x.abs().max().float().item() / 2 ** (levels - 1)
    assert codes.dtype == (torch.int8 if levels < 8 else torch.int16)
    assert luq_quantize(x, levels=levels, seed=1).dtype == dtype


@pytest.mark.parametrize("levels", [7, 8])
def test_maximum_maps_to_itself_and_sign_is_kept(levels: int) -> None:
    tensors = lognormal(4096 * 64).view(4096, 64)
    for seed, x in enumerate(tensors):  # 1 / alpha rounds down for about half of them
        q = luq_quantize(x, levels=levels, seed=seed)
        top = x.abs().argmax()
        assert q[top].abs() == q.abs().max()
        torch.testing.assert_close(q[top], x[top], rtol=0, atol=0)
        assert bool(((q == 0) | (q.sign() == x.sign())).all())


@pytest.mark.parametrize("levels", range(2, 9))
def test_maximum_reaches_the_top_level_before_any_rounding(levels: int) -> None:
    """Else it would round down once in some million steps: 1 / alpha rounds down for about every third maximum."""
    largest = torch.rand(50_000) + 0.5
    alpha = torch.stack([luq_scale(value, levels=levels) for value in largest[:500]])
    assert torch.equal(alpha, largest[:500] * 2.0 ** (1 - levels))
    alpha, top = largest * 2.0 ** (1 - levels), 2.0 ** (levels - 1)
    short = largest * (1 / alpha) < top
    inverse = _inverse(alpha, largest, top)
    assert 0.1 < short.float().mean() < 0.5
    assert bool((largest * inverse >= top).all())
    assert torch.equal(inverse[~short], (1 / alpha)[~short])


@pytest.mark.parametrize("levels", range(2, 9))
def test_idempotent_on_the_codebook(levels: int) -> None:
    for max_abs in (1.0, 3.0, 1e-20, 1e20, 0.1):
        x = codebook(levels).float() * max_abs
        for seed in range(20):
            once = luq_quantize(x, levels=levels, seed=seed)
            torch.testing.assert_close(once, x, rtol=0, atol=0)
    x = lognormal(4096)
    once = luq_quantize(x, levels=levels, seed=3)
    torch.testing.assert_close(luq_quantize(once, levels=levels, seed=4), once, rtol=0, atol=0)


@pytest.mark.parametrize("exponent", [-60, -7, 1, 40])
@pytest.mark.parametrize("levels", [7, 8])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_scaling_by_powers_of_two_is_exact(exponent: int, levels: int, power_of_two: bool) -> None:
    x = lognormal(10_000)
    plain = luq_quantize(x, levels=levels, power_of_two=power_of_two, seed=5)
    scaled = luq_quantize(x * 2.0**exponent, levels=levels, power_of_two=power_of_two, seed=5)
    torch.testing.assert_close(scaled, plain * 2.0**exponent, rtol=0, atol=0)


@pytest.mark.parametrize("levels", [7, 8])
def test_power_of_two_scale_covers_the_maximum(levels: int) -> None:
    for value in (1.0, 1.0000001, 1.9999999, 2.0, 3.0, 1e-30, 7e30, 0.75):
        largest = torch.tensor(value)
        alpha = luq_scale(largest, levels=levels, power_of_two=True)
        assert math.log2(alpha) == int(math.log2(alpha))
        assert alpha * 2 ** (levels - 1) >= largest > alpha * 2 ** (levels - 2)


def test_zero_empty_and_scalar_tensors() -> None:
    zeros = luq_quantize(torch.zeros(5))
    assert zeros.tolist() == [0.0] * 5
    for shape in ((0,), (3, 0), (0, 7)):
        assert luq_quantize(torch.empty(shape)).shape == shape
    scalar = luq_quantize(torch.tensor(-0.3))
    assert scalar.shape == ()
    assert scalar.item() == pytest.approx(-0.3, abs=1e-7)
    assert luq_quantize(torch.tensor([-0.0, 1.0])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("levels", [7, 8])
def test_non_finite_values_stay_visible(bad: float, levels: int) -> None:
    x = lognormal(100)
    x[37] = bad
    codes, alpha = luq_codes(x, levels=levels)
    assert alpha.isnan()
    assert not codes.any()
    assert luq_quantize(x, levels=levels).isnan().all()


def test_subnormal_tensors_stay_finite_and_small() -> None:
    for largest in (1e-45, 1e-40, TINY, TINY * 63, TINY * 64):
        x = torch.tensor([largest, -largest / 2, largest / 8])
        codes, alpha = luq_codes(x, seed=0)
        assert alpha.item() == max(TINY, x[0].item() / 64)
        assert bool(codes.abs().le(64).all())
    assert luq_quantize(torch.full((8192,), 1e-40), seed=0).unique().tolist() == pytest.approx([0.0, TINY])


def test_values_above_the_given_maximum_saturate() -> None:
    codes, alpha = luq_codes(torch.tensor([5.0, -3e38, 1.0]), max_abs=1.0, seed=0)
    assert codes.tolist() == [64, -64, 64]
    assert alpha == 1 / 64


def test_layout_and_dtype_do_not_matter() -> None:
    x = lognormal(60 * 50).to(torch.bfloat16).view(60, 50)
    expected = luq_codes(x.float(), seed=9)
    for other in (x.double(), x.t().contiguous().t(), x, x.view(3, 20, 50)[:, :, :].reshape(60, 50)):
        found = luq_codes(other, seed=9)
        assert torch.equal(found.codes, expected.codes)
        assert found.scale == expected.scale


def test_same_seed_same_codes_and_default_seed_from_torch() -> None:
    x = lognormal(5000)
    assert torch.equal(luq_codes(x, seed=1).codes, luq_codes(x, seed=1).codes)
    assert not torch.equal(luq_codes(x, seed=1).codes, luq_codes(x, seed=2).codes)
    torch.manual_seed(4)
    first, second = luq_codes(x).codes, luq_codes(x).codes
    torch.manual_seed(4)
    assert torch.equal(luq_codes(x).codes, first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("levels", [1, 9, 0, -1])
def test_levels_are_checked(levels: int) -> None:
    with pytest.raises(ConfigurationError, match="levels"):
        luq_codes(torch.ones(3), levels=levels)


def test_rounding_and_samples_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="rounding='up'"):
        luq_codes(torch.ones(3), rounding="up")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="samples"):
        smp_quantize(torch.ones(3), samples=0)
    assert GRADIENT_ROUNDINGS == ("luq", "no_underflow", "no_log_rounding", "nearest")


def test_hindsight_recursion() -> None:
    estimate, expected = HindsightMax(momentum=0.25), math.nan
    for observed in (4.0, 2.0, math.inf, 8.0, math.nan, 1.0):
        estimate.update(observed)
        if math.isfinite(observed):
            expected = observed if math.isnan(expected) else 0.75 * observed + 0.25 * expected
        assert estimate.value == expected
    other = HindsightMax(momentum=0.25)
    other.load_state_dict(estimate.state_dict())
    assert other.value == expected


def test_fine_tuning_learning_rate_is_the_triangle() -> None:
    rates = [fnt_learning_rate(t, total=10, start=0.2, base=1.2) for t in range(11)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 0.96, 0.72, 0.48, 0.24, 0.0])
    assert fnt_learning_rate(1, total=1, start=0.2, base=1.2) == 0.0


@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    dtype=st.sampled_from(FLOATS),
    levels=st.integers(2, 8),
    seed=st.integers(0, 2**64 - 1),
    exponent=st.integers(-140, 120),
    power_of_two=st.booleans(),
)
def test_any_tensor_gives_values_of_the_codebook(
    shape: list[int], dtype: torch.dtype, levels: int, seed: int, exponent: int, power_of_two: bool
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**63)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).mul(2.0**exponent).to(dtype)
    x = torch.where(x.float().isfinite(), x, 0)
    codes, alpha = luq_codes(x, levels=levels, seed=seed, power_of_two=power_of_two)
    assert codes.shape == x.shape
    assert alpha >= TINY
    magnitude = codes.abs().int()
    assert bool(((magnitude & (magnitude - 1)) == 0).all())  # zero or a power of two
    assert bool((magnitude <= 2 ** (levels - 1)).all())
    assert bool(((codes == 0) | (codes.sign() == x.sign())).all())
    error = (codes.double() * alpha.double() - x.double()).abs()
    assert bool((error <= torch.maximum(x.double().abs(), alpha.double())).all())  # never past the next level
