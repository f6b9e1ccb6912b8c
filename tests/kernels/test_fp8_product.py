"""Products on FP8 units: CUDA's rules on shapes and strides without a GPU, the numbers on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_eff.functional.codes import Codes
from lightning_eff.functional.numerics.fp8 import FP8_E4M3, FP8_E5M2, fp8_codes
from lightning_eff.kernels.fp8 import fp8_encode, fp8_product

SHAPES = [(1, 1, 1), (7, 20, 9), (32, 64, 48), (17, 16, 16), (16, 33, 31)]
LAYOUTS = {"row-major": lambda x: x, "transposed": lambda x: x.t().contiguous().t()}


def meta(rows: int, columns: int, dtype: torch.dtype, layout: str) -> Tensor:
    return LAYOUTS[layout](torch.empty(rows, columns, device="meta", dtype=dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_cudas_rules_are_met_for_every_shape_and_layout(shape: tuple[int, int, int], left: str, right: str) -> None:
    """Tensors of the device "meta" are checked as those of a GPU are."""
    m, k, n = shape
    one = torch.empty((), device="meta")
    for dtype in (torch.float32, torch.bfloat16):
        a, b = meta(m, k, FP8_E5M2, left), meta(k, n, FP8_E4M3, right)
        y = fp8_product(Codes(a, one), Codes(b, one), bias=torch.empty(n, device="meta"), dtype=dtype)
        assert (y.shape, y.dtype) == ((m, n), dtype)
        rows, columns = torch.empty(m, 1, device="meta"), torch.empty(1, n, device="meta")
        y = fp8_product(Codes(meta(m, k, FP8_E4M3, left), rows), Codes(b, columns), dtype=dtype)
        assert (y.shape, y.dtype) == ((m, n), dtype)


def test_the_rules_are_there_to_be_met() -> None:
    """Negative control: what the function above pads and turns is refused as it is."""
    one = torch.empty((), device="meta")
    a = torch.empty(32, 20, device="meta", dtype=FP8_E4M3)
    with pytest.raises(RuntimeError, match="divisible by 16"):
        torch._scaled_mm(a, torch.empty(32, 20, device="meta", dtype=FP8_E4M3).t(), scale_a=one, scale_b=one)
    a, b = (torch.empty(32, 32, device="meta", dtype=FP8_E4M3) for _ in range(2))
    with pytest.raises(RuntimeError, match="col_major"):
        torch._scaled_mm(a, b, scale_a=one, scale_b=one)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("formats", [(FP8_E4M3, FP8_E4M3), (FP8_E5M2, FP8_E4M3)], ids=str)
def test_one_scale_gives_the_product_of_the_values(
    shape: tuple[int, int, int], formats: tuple[torch.dtype, torch.dtype], seed: int
) -> None:
    m, k, n = shape
    a, b = fp8_codes(torch.randn(m, k), formats[0]), fp8_codes(torch.randn(k, n), formats[1])
    bias = torch.randn(n)
    y = fp8_product(a, b, factor=0.5, bias=bias)
    expected = a.dequantize(torch.float64) @ b.dequantize(torch.float64) * 0.5 + bias
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * k)


def test_a_scale_per_row_gives_bfloat16_sums(seed: int) -> None:
    x, w = torch.randn(12, 40), torch.randn(40, 20)
    x[3] *= 1e5
    a, b = fp8_codes(x, FP8_E4M3, dim=1), fp8_codes(w, FP8_E4M3, dim=0)
    expected = a.dequantize() @ b.dequantize()
    y = fp8_product(a, b)
    assert ((y - expected).abs() <= 2.0**-8 * expected.abs() + 1e-6 * expected.abs().amax(1, keepdim=True)).all()


def test_a_maximum_from_the_past_saturates_and_is_observed(seed: int) -> None:
    x, seen = torch.randn(1000), torch.empty(())
    codes, kept = fp8_encode(x, FP8_E4M3, keep=True, max_abs=1.0, observed=seen)
    plain = fp8_codes(x, FP8_E4M3, max_abs=torch.tensor(1.0))
    assert seen == x.abs().max() > 1
    assert kept is not None
    assert torch.equal(kept.view(torch.uint8), plain.codes.view(torch.uint8))
    assert codes.scale == plain.scale == 1 / torch.tensor(448.0)
    assert codes.codes.abs().max() == 448
    for bad in (torch.nan, torch.inf):
        x[500] = bad
        codes, kept = fp8_encode(x, FP8_E4M3, keep=True, max_abs=1.0, observed=seen)
        assert not seen.isfinite()
        assert codes.scale.isnan()
        assert not codes.codes.any()
        assert fp8_codes(x, FP8_E4M3, max_abs=torch.tensor(1.0)).scale.isnan()
