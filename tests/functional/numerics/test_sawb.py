"""SAWB: near the best uniform quantiser there is, its code ranges, its way out of degenerate data."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from lightning_eff.errors import ConfigurationError
from lightning_eff.functional import sawb_codes, sawb_quantize, sawb_scale, sqnr_db
from lightning_eff.functional.codes import TINY
from lightning_eff.functional.numerics.sawb import Unsigned

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
U = torch.linspace(0.5 / 400_000, 1 - 0.5 / 400_000, 400_000, dtype=torch.float64)  # midpoints of equal probability
DISTRIBUTIONS = {
    "gaussian": torch.special.ndtri(U),
    "laplace": -(U - 0.5).sign() * torch.log1p(-2 * (U - 0.5).abs()),
    "uniform": U - 0.5,
    "logistic": torch.logit(U),
}
# clip / rms: least mean squared error by search, and what SAWB gives (specification, section 3.3).
PUBLISHED = {"gaussian": (2.47, 2.433), "laplace": (3.40, 3.52), "uniform": (1.617, 1.618), "logistic": (2.95, 2.84)}


def mse(x: Tensor, step: float, low: int, high: int) -> float:
    return float(((x / step).round().clamp(low, high) * step - x).square().mean())


def best_step(x: Tensor, low: int, high: int) -> float:
    """Search of the step of least mean squared error, to 0.1 %."""
    rms = float(x.square().mean().sqrt())
    candidates = torch.linspace(0.5, 6.0, 80) * rms / high
    for _ in range(3):
        errors = [mse(x, float(step), low, high) for step in candidates]
        centre = float(candidates[min(range(len(errors)), key=errors.__getitem__)])
        width = float(candidates[1] - candidates[0])
        candidates = torch.linspace(centre - width, centre + width, 9)
    return centre


@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_clip_is_near_the_optimum(name: str) -> None:
    x = DISTRIBUTIONS[name][::8]
    rms = float(x.square().mean().sqrt())
    found, best = float(sawb_scale(x)), best_step(x, -7, 7)
    published_best, published_sawb = PUBLISHED[name]
    assert best * 7 / rms == pytest.approx(published_best, rel=0.01)
    assert found * 7 / rms == pytest.approx(published_sawb, rel=0.005)
    assert mse(x, found, -7, 7) < 1.05 * mse(x, best, -7, 7)


def test_scale_is_the_formula() -> None:
    x = torch.randn(1000, dtype=torch.float64)
    clip = 12.035 * x.square().mean().sqrt() - 12.03 * x.abs().mean()
    assert float(sawb_scale(x)) == pytest.approx(float(clip / 7), rel=1e-5)
    relu = x.relu()
    kept = relu[relu > 0]
    mirror = 17.74 * kept.square().mean().sqrt() - 18.64 * kept.mean()
    assert float(sawb_scale(relu, unsigned="mirror5")) == pytest.approx(float(mirror / 15), rel=1e-5)
    reference = 12.1 * relu.square().mean().sqrt() - 12.2 * relu.mean()
    assert float(sawb_scale(relu, unsigned="reference")) == pytest.approx(float(2 * reference / 15), rel=1e-5)
    two = 3.12 * x.square().mean().sqrt() - 2.064 * x.abs().mean()
    assert float(sawb_scale(x, bits=2)) == pytest.approx(float(two), rel=1e-5)


def test_mirror_beats_the_reference_after_relu() -> None:
    x = DISTRIBUTIONS["gaussian"].relu()
    mirror, reference, signed = (
        float(sqnr_db(x, sawb_quantize(x, unsigned=kind))) for kind in ("mirror5", "reference", False)
    )
    best = 10 * math.log10(float(x.square().mean()) / mse(x, best_step(x[::8], 0, 15), 0, 15))
    assert mirror > best - 0.1  # dB
    assert mirror > reference + 5  # "wastes more than one bit": 6 dB
    assert mirror > signed + 5
    top = float(sawb_scale(x, unsigned="mirror5")) * 15
    assert top == pytest.approx(2.867, abs=0.01)
    assert float(sawb_scale(x, unsigned="reference")) * 15 == pytest.approx(7.38, abs=0.02)


@pytest.mark.parametrize(
    ("bits", "unsigned", "low", "high"),
    [(2, False, -1, 1), (3, False, -3, 3), (4, False, -7, 7), (4, "mirror5", 0, 15), (4, "reference", 0, 15)],
)
def test_code_ranges_are_used_and_kept(bits: int, unsigned: Unsigned, low: int, high: int) -> None:
    x = torch.randn(10_000) * (1 + torch.rand(10_000).mul(8).exp())
    codes = sawb_codes(x.abs() if unsigned else x, bits=bits, unsigned=unsigned, scale=torch.tensor(1.0)).codes
    assert codes.dtype == torch.int8
    assert codes.unique().tolist() == list(range(low, high + 1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_is_to_the_nearest_even_code(dtype: torch.dtype) -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.75, 6.5, 7.5, 100.0, -100.0], dtype=dtype)
    codes, _ = sawb_codes(x, scale=torch.tensor(1.0))
    assert codes.tolist() == [0, 2, 2, 0, -2, 1, 6, 7, 7, -7]


@pytest.mark.parametrize("unsigned", [False, "mirror5", "reference"])
def test_nearly_binary_data_use_the_largest_magnitude(unsigned: Unsigned) -> None:
    x = torch.ones(64) * 3.0
    if unsigned is False:
        x[::2] = -3.0
    codes, scale = sawb_codes(x, unsigned=unsigned)
    high = 15 if unsigned else 7
    assert float(scale) == pytest.approx(3.0 / high)
    assert codes.abs().unique().tolist() == [high]


FLATTER_THAN_UNIFORM = {
    "signs with noise": (U - 0.5).sign()
    * (1 + 0.3 * torch.special.ndtri(U[torch.randperm(U.numel(), generator=torch.Generator().manual_seed(0))])),
    "sigmoid": DISTRIBUTIONS["gaussian"].sigmoid(),
    "images": (0.5 + 0.25 * DISTRIBUTIONS["gaussian"]).clamp(0, 1),
    "far from zero": 3 + 0.5 * DISTRIBUTIONS["gaussian"],
    "signs and an outlier": torch.cat([(U - 0.5).sign(), torch.tensor([100.0], dtype=torch.float64)]),
}


@pytest.mark.parametrize("name", list(FLATTER_THAN_UNIFORM))
def test_flat_data_are_near_the_optimum(name: str) -> None:
    """Beyond uniform data the formula falls to 5 dB and below; the range used instead stays within 3 dB of a search."""
    x = FLATTER_THAN_UNIFORM[name]
    signed = bool(x.min() < 0)
    low, high = (-7, 7) if signed else (0, 15)
    found = float(sawb_scale(x, unsigned=False if signed else "mirror5"))
    best = best_step(x[::8] if "outlier" not in name else x, low, high)
    assert mse(x, found, low, high) < 2 * mse(x, best, low, high)


@pytest.mark.parametrize("exponent", [-40, -3, 5, 40])
@pytest.mark.parametrize("unsigned", [False, "mirror5", "reference"])
def test_scaling_by_powers_of_two_is_exact(exponent: int, unsigned: Unsigned) -> None:
    x = torch.randn(3000)
    x = x.abs() if unsigned else x
    plain, scaled = sawb_codes(x, unsigned=unsigned), sawb_codes(x * 2.0**exponent, unsigned=unsigned)
    assert torch.equal(plain.codes, scaled.codes)
    assert scaled.scale == plain.scale * 2.0**exponent


def test_signed_quantiser_is_odd() -> None:
    x = torch.randn(3000)
    assert torch.equal(sawb_quantize(-x), -sawb_quantize(x))


@pytest.mark.parametrize("value", [1e20, 3e38, 1e-25, 1e-40, TINY])
def test_very_large_and_very_small_tensors_stay_finite(value: float) -> None:
    x = torch.tensor([-1.0, -0.6, 0.1, 0.4, 1.0]) * value
    q = sawb_quantize(x)
    assert bool(q.isfinite().all())
    if value > 1e-37:
        assert float(sqnr_db(x.double() / value, q.double() / value)) > 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("unsigned", [False, "mirror5", "reference"])
def test_non_finite_values_stay_visible(bad: float, unsigned: Unsigned) -> None:
    x = torch.rand(100)
    x[3] = bad
    codes, scale = sawb_codes(x, unsigned=unsigned)
    assert scale.isnan()
    assert not codes.any()
    assert sawb_quantize(x, unsigned=unsigned).isnan().all()


@pytest.mark.parametrize("unsigned", [False, "mirror5", "reference"])
def test_zero_empty_and_scalar_tensors(unsigned: Unsigned) -> None:
    assert sawb_quantize(torch.zeros(7), unsigned=unsigned).tolist() == [0.0] * 7
    assert sawb_quantize(torch.empty(0, 3), unsigned=unsigned).shape == (0, 3)
    assert sawb_quantize(torch.tensor(2.5), unsigned=unsigned).shape == ()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"bits": 5}, "bits=5"),
        ({"bits": 0}, "bits=0"),
        ({"bits": 2, "unsigned": "mirror5"}, "bits=2"),
        ({"unsigned": "mirror"}, "unsigned='mirror'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        sawb_codes(torch.ones(3), **arguments)


@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    dtype=st.sampled_from(FLOATS),
    unsigned=st.sampled_from([False, "mirror5", "reference"]),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-140, 120),
)
def test_any_tensor_gives_its_nearest_codes(
    shape: list[int], dtype: torch.dtype, unsigned: Unsigned, seed: int, exponent: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).mul(2.0**exponent).to(dtype)
    x = torch.where(x.float().isfinite(), x, 0)
    x = x.abs() if unsigned else x
    codes, scale = sawb_codes(x, unsigned=unsigned)
    low, high = (0, 15) if unsigned else (-7, 7)
    assert codes.shape == x.shape
    assert bool(scale >= TINY)
    assert bool(scale.isfinite())
    assert bool(((codes >= low) & (codes <= high)).all())
    y = x.double() / scale.double()
    inside = y.clamp(low, high)
    rounding = 15 * 2.0**-22  # 1 / scale and the product are rounded to float32, y is at most 15
    assert bool(((codes.double() - inside).abs() <= 0.5 + rounding).all())
