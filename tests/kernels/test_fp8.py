"""The compiled FP8 casts against torch's own, over every bfloat16 number and many float32 ones."""

from __future__ import annotations

import pytest
import torch

from lightning_eff.functional import fp8_codes
from lightning_eff.functional.numerics.fp8 import FP8_E4M3, FP8_E5M2
from lightning_eff.kernels.build import library
from lightning_eff.kernels.fp8 import fp8_decode, fp8_encode

FORMATS = pytest.mark.parametrize("dtype", [FP8_E4M3, FP8_E5M2], ids=["e4m3", "e5m2"])


def finite_bfloat16() -> torch.Tensor:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return every[every.isfinite()]


@FORMATS
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("magnitude", [1e-38, 1e-6, 1.0, 448.0, 1e10])
def test_codes_are_those_of_functional(dtype: torch.dtype, power_of_two: bool, magnitude: float, seed: int) -> None:
    x = torch.randn(50_001) * torch.randn(50_001).mul(4).exp() * magnitude
    expected = fp8_codes(x, dtype, power_of_two=power_of_two)
    codes, kept = fp8_encode(x, dtype, power_of_two=power_of_two, keep=True)
    assert torch.equal(codes.scale, expected.scale)
    assert kept is not None
    assert torch.equal(kept.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(codes.codes.float(), expected.codes.float())
    assert torch.equal(fp8_decode(kept), codes.codes)


@FORMATS
def test_every_bfloat16_number_in_range_is_cast_as_torch_does(dtype: torch.dtype) -> None:
    x = finite_bfloat16()
    top = torch.finfo(dtype).max
    x = x[x.abs() <= top]
    assert x.abs().max() == top, "with the maximum in it the scale is one"
    codes, kept = fp8_encode(x, dtype, keep=True)
    assert codes.scale == 1
    assert kept is not None
    assert torch.equal(kept.view(torch.uint8), x.to(dtype).view(torch.uint8))


@FORMATS
def test_every_finite_code_is_decoded_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    finite = every[every.float().isfinite()]
    assert torch.equal(fp8_decode(finite).float(), finite.float())


@FORMATS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_tensor_stays_visible(dtype: torch.dtype, bad: float) -> None:
    codes, kept = fp8_encode(torch.tensor([1.0, bad]), dtype, keep=True)
    assert codes.scale.isnan()
    assert codes.codes.tolist() == [0, 0]
    assert kept is not None
    assert kept.float().tolist() == [0, 0]


@pytest.mark.parametrize("size", [0, 1, 2047, 2049, 70_000])
def test_without_kernels_the_numbers_are_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if library() is None:
        pytest.skip("no compiled kernels here")
    x = torch.randn(size)
    fast = fp8_encode(x, FP8_E4M3, keep=True)
    monkeypatch.setattr("lightning_eff.kernels.operands.library", lambda: None)
    slow = fp8_encode(x, FP8_E4M3, keep=True)
    assert torch.equal(fast[0].codes, slow[0].codes)
    assert torch.equal(fast[0].scale, slow[0].scale)
