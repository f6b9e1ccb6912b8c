"""Products of codes, native and emulated, against float64 to the last bit; long sums are split before they overflow."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from lightning_eff.functional.codes import Codes
from lightning_eff.kernels import products
from lightning_eff.kernels.products import code_product, rescale, scaled_product


def codes(*shape: int, low: int = -7, high: int = 7) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def oracle(a: Tensor, b: Tensor) -> Tensor:
    return a.double() @ b.double()


SHAPES = [(1, 1, 1), (1, 5, 1), (3, 1, 2), (2, 17, 9), (64, 64, 64), (33, 129, 7), (5, 1000, 3), (0, 4, 3), (3, 0, 4)]
SHAPES += [(1, 17, 1), (1, 64, 33), (1, 1, 64), (64, 1, 1), (17, 64, 1)]  # a transposed column has odd strides


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("m", "k", "n"), [*SHAPES, (3, 4, 0)])
def test_code_product_is_exact(m: int, k: int, n: int, native: bool) -> None:
    for (low_a, high_a), (low_b, high_b) in (((-7, 7), (-7, 7)), ((-64, 64), (-7, 7)), ((-64, 64), (0, 15))):
        a, b = codes(m, k, low=low_a, high=high_a), codes(k, n, low=low_b, high=high_b)
        turned_a, turned_b = a.t().contiguous().t(), b.t().contiguous().t()
        for left, right in ((a, b), (turned_a, b), (a, turned_b), (turned_a, turned_b)):
            assert torch.equal(code_product(left, right, native=native).double(), oracle(a, b))


def test_codes_beyond_int8_are_emulated() -> None:
    a, b = torch.full((2, 300), 128, dtype=torch.int16), codes(300, 4, low=0, high=15)
    assert torch.equal(code_product(a, b, native=True).double(), oracle(a, b))


@pytest.mark.parametrize("limit", [1, 7, 64, 1000])
def test_long_sums_are_split_before_float32_rounds(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    a, b = codes(5, 200, low=-64, high=64), codes(200, 6, low=0, high=15)
    monkeypatch.setattr(products, "FLOAT32_TERMS", limit)
    assert torch.equal(code_product(a, b, native=False).double(), oracle(a, b))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_the_longest_sum_is_exact_for_any_codes(dtype: torch.dtype, native: bool) -> None:
    """Full scale on both sides, one term more than a sum holds, and one that shows any rounding."""
    lowest = torch.iinfo(dtype).min
    assert products.FLOAT32_TERMS * products.INT8_TERM <= 2**24
    assert products.INT32_TERMS * products.INT8_TERM < 2**31
    assert products._OTHER_TERMS * 2**30 <= 2**53
    for terms in (products.FLOAT32_TERMS, products.INT32_TERMS, 3 * products.INT32_TERMS, products._OTHER_TERMS):
        a, b = torch.full((1, terms + 2), lowest, dtype=dtype), torch.full((terms + 2, 1), lowest, dtype=dtype)
        b[-1] = a[0, -1] = 1
        exact = (terms + 1) * lowest**2 + 1
        found = code_product(a, b, native=native).item()
        if native and dtype == torch.int16:  # rounded by float32, see kernels/int16.py
            assert abs(found - exact) <= (terms / 2 + terms / 512 + 4) * 2**-24 * exact
        else:
            assert found == exact


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("limit", [3, 10, 50, 99, 100])
def test_long_sums_are_split_before_int32_overflows(monkeypatch: pytest.MonkeyPatch, limit: int, native: bool) -> None:
    a = Codes(codes(5, 100, low=-64, high=64), torch.tensor(0.25))
    b, bias = Codes(codes(100, 6), torch.tensor(0.5)), torch.arange(6.0)
    expected = oracle(a.codes, b.codes) * 0.125 + bias.double()
    for name in ("INT32_TERMS", "FLOAT32_TERMS"):
        monkeypatch.setattr(products, name, limit)
    longest = []
    original = products.single_product

    def watched(left: Tensor, right: Tensor, native: bool) -> tuple[Tensor, bool]:
        longest.append(left.shape[1])
        return original(left, right, native)

    monkeypatch.setattr(products, "single_product", watched)
    found = scaled_product(a, b, native=native, bias=bias)
    assert torch.equal(found.double(), expected)
    assert max(longest) <= limit
    assert sum(longest) == 100


@pytest.mark.parametrize("native", [True, False])
def test_sums_of_several_products_do_not_share_the_buffer_of_a_product(native: bool) -> None:
    pairs = [(codes(5, k, low=-64, high=64), codes(k, 6, low=0, high=15)) for k in (7, 100, 0, 1, 2000)]
    found = products.sum_of_products(pairs, native=native)
    assert found is not None
    assert torch.equal(found.double(), sum(oracle(a, b) for a, b in pairs))
    assert products.sum_of_products([], native=native) is None
    assert products.sum_of_products([(codes(5, 0), codes(0, 6))], native=native) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kernels", [True, False])
def test_rescale(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, with_bias: bool, kernels: bool) -> None:
    """One rounding for the scale, one for the product, one for the sum, one for the dtype; in this order."""
    if not kernels:
        monkeypatch.setattr("lightning_eff.kernels.operands.library", lambda: None)
    a, b, factor = torch.tensor(0.013), torch.tensor(0.21), 0.5
    bias = torch.randn(40).to(dtype) if with_bias else None
    for acc in (torch.randint(-50_000, 50_000, (300, 40), dtype=torch.int32), torch.randn(300, 40).mul(99).round()):
        expected = acc.to(torch.float32) * (a * b * factor)
        expected = (expected if bias is None else expected + bias.float()).to(dtype)
        for out in (None, torch.empty(300, 40, dtype=dtype)):
            found = rescale(acc, a, b, factor=factor, bias=bias, dtype=dtype, out=out)
            assert found.dtype == dtype
            assert torch.equal(found, expected)
            assert out is None or found.data_ptr() == out.data_ptr()
    assert rescale(torch.zeros(2, 40, dtype=torch.int32), torch.tensor(torch.nan), b, dtype=dtype).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(("m", "n"), [(300, 40), (1, 1), (1, 37), (37, 1), (300, 301), (0, 4), (4, 0)])
def test_rescale_by_vectors(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, with_bias: bool, kernels: bool, m: int, n: int
) -> None:
    """A scale for each row, for each column or both; one rounding for each product and for the sum, in this order."""
    if not kernels:
        monkeypatch.setattr("lightning_eff.kernels.operands.library", lambda: None)
    row, column, one, factor = torch.rand(m, 1), torch.rand(n, 1).t(), torch.tensor(0.21), 1 / 3
    bias = torch.randn(n).to(dtype) if with_bias else None
    floats = torch.randn(m, n).mul(99)
    for acc in (floats.to(torch.int32), floats, floats.bfloat16(), floats.double(), floats.t().contiguous().t()):
        for a, b in ((row, column), (row, one), (one, column)):
            expected = acc.to(torch.float32) * (a * factor) * b
            expected = (expected if bias is None else expected + bias.float()).to(dtype)
            for out in (None, torch.empty(m, n, dtype=dtype)):
                found = rescale(acc, a, b, factor=factor, bias=bias, dtype=dtype, out=out)
                assert found.dtype == dtype
                assert torch.equal(found, expected)
                assert out is None or found.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_is_not_a_number_stays_in_its_line(dtype: torch.dtype) -> None:
    row, column = torch.ones(5, 1), torch.ones(1, 6)
    row[2], column[0, 3] = torch.nan, torch.nan
    found = rescale(torch.ones(5, 6), row, column, dtype=dtype)
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[2], expected[:, 3] = True, True
    assert torch.equal(found.isnan(), expected)


@given(
    m=st.integers(1, 20), k=st.integers(1, 200), n=st.integers(1, 20), seed=st.integers(0, 10**6), native=st.booleans()
)
def test_any_scaled_product(m: int, k: int, n: int, seed: int, native: bool) -> None:
    torch.manual_seed(seed)
    a = Codes(codes(m, k, low=-64, high=64), torch.rand(()))
    b = Codes(codes(k, n, low=0, high=15), torch.rand(()))
    exact = oracle(a.codes, b.codes)
    found = scaled_product(a, b, native=native)
    assert torch.equal(found, exact.float() * (a.scale * b.scale * 1.0))
    dequantised = oracle(a.dequantize(torch.float64), b.dequantize(torch.float64))
    torch.testing.assert_close(found.double(), dequantised, rtol=4 * 2.0**-24, atol=k * 960 * 4 * 2.0**-24)


def test_buffers_are_shared_and_grow() -> None:
    scratch = products._Scratch()
    small = scratch("a", 10, torch.int8)
    assert scratch("a", 5, torch.int8).data_ptr() == small.data_ptr()
    assert scratch("a", 10, torch.int32).data_ptr() != small.data_ptr()
    assert scratch("b", 10, torch.int8).data_ptr() != small.data_ptr()
    assert scratch("a", 1000, torch.int8).numel() == 1000
