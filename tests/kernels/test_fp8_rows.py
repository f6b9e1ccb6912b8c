"""The compiled FP8 casts with a scale per row and per column against functional's, bit for bit."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from lightning_eff.errors import ConfigurationError
from lightning_eff.functional import fp8_codes
from lightning_eff.functional.codes import Codes
from lightning_eff.functional.numerics.fp8 import FP8_E4M3, FP8_E5M2
from lightning_eff.kernels.build import library
from lightning_eff.kernels.fp8 import fp8_decode
from lightning_eff.kernels.fp8_rows import fp8_encode_along, fp8_encode_both

FORMATS = pytest.mark.parametrize("dtype", [FP8_E4M3, FP8_E5M2], ids=["e4m3", "e5m2"])
INPUTS = pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
OCTAVES = pytest.mark.parametrize("power_of_two", [False, True], ids=["exact", "octaves"])
DIMS: tuple[Literal[0, 1], ...] = (0, 1)

SHAPES = [(1, 1), (1, 70_000), (70_000, 1), (1, 33), (33, 1), (3, 5), (7, 2047), (2, 2048), (3, 4099), (257, 129)]
SHAPES += [(1024, 64), (2049, 17), (0, 5), (5, 0), (0, 0), (1, 0), (0, 1)]


def matrix(*shape: int, magnitude: float = 1.0) -> Tensor:
    """Rows and columns of very different size, and many octaves in each."""
    rows, columns = (torch.randn(n).mul(3).exp() for n in shape)
    return torch.randn(shape) * torch.randn(shape).mul(2).exp() * rows[:, None] * columns * magnitude


def assert_same(found: Codes, expected: Codes) -> None:
    assert found.codes.shape == expected.codes.shape
    assert found.scale.shape == expected.scale.shape
    assert found.scale.dtype == torch.float32
    assert torch.equal(found.scale.view(torch.int32), expected.scale.view(torch.int32))
    # float32 bits, so that the sign of zero counts
    assert torch.equal(found.codes.float().view(torch.int32), expected.codes.float().view(torch.int32))


def check(x: Tensor, dtype: torch.dtype, *, power_of_two: bool = False) -> None:
    """All that the module makes of ``x``, against functional."""
    expected = {dim: fp8_codes(x, dtype, power_of_two=power_of_two, dim=dim) for dim in DIMS}
    for dim in DIMS:
        codes, kept = fp8_encode_along(x, dtype, dim, power_of_two=power_of_two, keep=True)
        assert codes.codes.dtype == torch.bfloat16
        assert kept is not None
        assert_same(codes, expected[dim])
        assert torch.equal(kept.view(torch.uint8), expected[dim].codes.contiguous().view(torch.uint8))
        assert torch.equal(fp8_decode(kept), codes.codes)
        plain, nothing = fp8_encode_along(x, dtype, dim, power_of_two=power_of_two)
        assert_same(plain, expected[dim])
        assert nothing is None
    for keep in (False, True):
        rows, columns = fp8_encode_both(x, dtype, power_of_two=power_of_two, keep_columns=keep)
        assert rows.codes.dtype == torch.bfloat16
        assert columns.codes.dtype == (dtype if keep else torch.bfloat16)
        assert_same(rows, expected[1])
        assert_same(columns, expected[0])


@FORMATS
@INPUTS
@OCTAVES
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_those_of_functional(
    dtype: torch.dtype, kind: torch.dtype, power_of_two: bool, shape: tuple[int, int]
) -> None:
    check(matrix(*shape).to(kind), dtype, power_of_two=power_of_two)


@FORMATS
@INPUTS
@OCTAVES
@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e-12, 1e-6, 448.0, 1e10, 1e25])
def test_magnitudes(dtype: torch.dtype, kind: torch.dtype, power_of_two: bool, magnitude: float, seed: int) -> None:
    check(matrix(129, 301, magnitude=magnitude).to(kind), dtype, power_of_two=power_of_two)


@FORMATS
def test_every_finite_bfloat16_number(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.isfinite()].view(-1, 255)
    check(x, dtype)
    check(x.t(), dtype)


@FORMATS
@INPUTS
def test_ties_and_saturation(dtype: torch.dtype, kind: torch.dtype) -> None:
    """Multiples of a sixteenth of a step under a maximum that makes the scale one; and its like in every binade."""
    grid = torch.arange(-512, 513).float() / 512
    top = torch.finfo(dtype).max
    x = torch.stack([grid * top * 2.0**-octave for octave in range(24)])
    x[:, 0] = top
    check(x.to(kind), dtype)
    check(x.t().to(kind), dtype)


@FORMATS
@INPUTS
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_broken_line_stays_visible_and_alone(dtype: torch.dtype, kind: torch.dtype, bad: float) -> None:
    x = matrix(150, 260).to(kind)
    x[3, 7] = x[149, 259] = x[3, 100] = bad
    check(x, dtype)
    rows, columns = fp8_encode_both(x, dtype)
    assert rows.scale.isnan().nonzero()[:, 0].tolist() == [3, 149]
    assert columns.scale.isnan().nonzero()[:, 1].tolist() == [7, 100, 259]
    assert not rows.codes[3].any()
    assert not columns.codes[:, 7].any()
    assert rows.codes[4].isfinite().all()


@FORMATS
@INPUTS
def test_lines_of_zeros_have_the_scale_of_the_floor(dtype: torch.dtype, kind: torch.dtype) -> None:
    x = matrix(40, 30).to(kind)
    x[5], x[:, 9], x[6] = 0.0, 0.0, -0.0
    check(x, dtype)
    check(torch.zeros(3, 4, dtype=kind), dtype)
    check(x * torch.tensor(1e-30, dtype=kind), dtype)


@FORMATS
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_layout_and_floating_dtype(dtype: torch.dtype, kind: torch.dtype) -> None:
    x = torch.randn(70, 90).to(kind)
    for view in (x.t(), x[:, ::3], x[1::2, 5:], x[:1].expand(20, -1), x[:, :1].expand(-1, 20), x[:, 0:1], x[0:1].t()):
        check(view, dtype)
    check(x.requires_grad_(), dtype)


@FORMATS
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    """Half-precision plugins change it for the time of the step."""
    x = matrix(300, 200)
    torch.set_default_dtype(torch.bfloat16)
    try:
        check(x, dtype)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kernels", [True, False])
def test_buffers_are_filled(dim: Literal[0, 1], kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr("lightning_eff.kernels.operands.library", lambda: None)
    x, buffer, other = torch.randn(30, 50), *torch.full((2, 2000), 7.0, dtype=torch.bfloat16)
    codes, _ = fp8_encode_along(x, FP8_E4M3, dim, out=buffer)
    assert codes.codes.data_ptr() == buffer.data_ptr()
    assert_same(codes, fp8_codes(x, FP8_E4M3, dim=dim))
    rows, columns = fp8_encode_both(x, FP8_E4M3, out=buffer, out_columns=other)
    assert rows.codes.data_ptr() == buffer.data_ptr()
    assert columns.codes.data_ptr() == other.data_ptr()
    assert_same(rows, fp8_codes(x, FP8_E4M3, dim=1))
    assert_same(columns, fp8_codes(x, FP8_E4M3, dim=0))
    assert (buffer[1500:] == 7).all()
    assert (other[1500:] == 7).all()


@FORMATS
@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (4, 0), (300, 200)], ids=str)
def test_without_kernels_the_numbers_are_the_same(
    dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if library() is None:
        pytest.skip("no compiled kernels here")
    monkeypatch.setattr("lightning_eff.kernels.operands.library", lambda: None)
    check(matrix(*shape), dtype)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="no FP8 format"):
        fp8_encode_along(torch.ones(2, 2), torch.bfloat16, 1)
    with pytest.raises(ConfigurationError, match="no FP8 format"):
        fp8_encode_both(torch.ones(2, 2), torch.int8)
