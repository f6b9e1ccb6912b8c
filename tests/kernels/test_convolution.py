"""Convolutions of codes in all three products, native and emulated, against torch's own in float64."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lightning_eff.functional.codes import Codes
from lightning_eff.kernels import convolution, products
from lightning_eff.kernels.convolution import conv_forward, conv_input_grad, conv_weight_grad, gather, gather_indexed
from lightning_eff.kernels.geometry import Geometry, Triple, emulated_weight_grad

ONE, ZERO = (1, 1, 1), (0, 0, 0)
# Each: images, input and output channels; input size; geometry.
CASES: dict[str, tuple[Triple, Triple, Geometry]] = {
    "1x1": ((3, 5, 4), (1, 6, 7), Geometry(ONE, ONE, ZERO, ONE)),
    "3x3": ((2, 3, 4), (1, 8, 6), Geometry((1, 3, 3), ONE, (0, 1, 1), ONE)),
    "3x3 no padding": ((2, 3, 4), (1, 8, 6), Geometry((1, 3, 3), ONE, ZERO, ONE)),
    "7x5 stride 2": ((2, 2, 3), (1, 15, 11), Geometry((1, 7, 5), (1, 2, 2), (0, 3, 2), ONE)),
    "stride 3x2": ((2, 3, 2), (1, 13, 12), Geometry((1, 3, 2), (1, 3, 2), (0, 0, 1), ONE)),
    "stride beyond kernel": ((2, 2, 3), (1, 11, 12), Geometry((1, 2, 1), (1, 3, 4), ZERO, ONE)),
    "1x1 stride 2": ((2, 3, 4), (1, 7, 8), Geometry(ONE, (1, 2, 2), ZERO, ONE)),
    "1x1 padded": ((2, 3, 4), (1, 4, 3), Geometry(ONE, ONE, (0, 1, 2), ONE)),
    "dilated": ((2, 3, 2), (1, 11, 12), Geometry((1, 3, 3), ONE, (0, 2, 3), (1, 2, 3))),
    "dilated and strided": ((2, 3, 2), (1, 11, 12), Geometry((1, 3, 3), (1, 2, 3), (0, 2, 3), (1, 3, 2))),
    "padding beyond kernel": ((1, 2, 3), (1, 3, 3), Geometry((1, 2, 2), ONE, (0, 3, 4), ONE)),
    "1-d": ((3, 4, 5), (1, 1, 17), Geometry((1, 1, 5), (1, 1, 2), (0, 0, 2), ONE)),
    "1-d causal": ((2, 3, 3), (1, 1, 9), Geometry((1, 1, 3), ONE, (0, 0, 4), (1, 1, 2))),
    "3-d": ((2, 3, 4), (5, 6, 4), Geometry((3, 2, 3), (2, 1, 2), (1, 0, 1), (1, 2, 1))),
    "3-d of depth 1": ((2, 3, 4), (1, 6, 4), Geometry((3, 3, 1), ONE, (1, 1, 0), ONE)),
    "depthwise": ((2, 4, 4), (1, 6, 7), Geometry((1, 3, 3), (1, 2, 1), (0, 1, 1), ONE, 4)),
    "groups": ((2, 4, 6), (1, 6, 7), Geometry((1, 3, 3), ONE, (0, 1, 1), (1, 2, 1), 2)),
    "grouped 3-d": ((2, 4, 2), (3, 4, 5), Geometry((2, 2, 2), ONE, (1, 0, 1), ONE, 2)),
    "one pixel": ((1, 1, 1), ONE, Geometry(ONE, ONE, ZERO, ONE)),
    "kernel of the input's size": ((2, 3, 4), (1, 5, 4), Geometry((1, 5, 4), ONE, ZERO, ONE)),
    "input wider than used": ((1, 2, 2), (1, 8, 8), Geometry((1, 2, 2), (1, 3, 3), ZERO, ONE)),
    "no images": ((0, 3, 4), (1, 5, 6), Geometry((1, 3, 3), ONE, (0, 1, 1), ONE)),
}


def oracle(x: Tensor, w: Tensor, dy: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Output, input gradient and weight gradient in float64, in the layouts of the kernels."""
    image = x.double().permute(0, 4, 1, 2, 3).requires_grad_()
    kernel = w.double().transpose(1, 2).reshape(w.shape[0], w.shape[2], *geometry.kernel).requires_grad_()
    y = torch.nn.functional.conv3d(
        image, kernel, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    )
    dx, dw = torch.autograd.grad(y, (image, kernel), dy.double().permute(0, 4, 1, 2, 3))
    last = (0, 2, 3, 4, 1)
    return y.detach().permute(last), dx.permute(last), dw.flatten(2).transpose(1, 2)


def operands(shape: Triple, size: Triple, geometry: Geometry) -> tuple[Codes, Codes, Codes]:
    """Codes of input, weight and output gradient; scales are powers of two, so every result is exact."""
    images, inputs, outputs = shape
    taps = geometry.kernel[0] * geometry.kernel[1] * geometry.kernel[2]
    x = torch.randint(0, 16, (images, *size, inputs), dtype=torch.int8)
    w = torch.randint(-7, 8, (outputs, taps, inputs // geometry.groups), dtype=torch.int8)
    dy = torch.randint(-64, 65, (images, *geometry.out_size(size), outputs), dtype=torch.int8)
    return Codes(x, torch.tensor(0.5)), Codes(w, torch.tensor(0.25)), Codes(dy, torch.tensor(2.0))


def check(x: Codes, w: Codes, dy: Codes, geometry: Geometry, size: Triple, native: bool) -> None:
    y_sums, dx_sums, dw_sums = oracle(x.codes, w.codes, dy.codes, geometry)
    bias = torch.arange(w.codes.shape[0]).float()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        y = conv_forward(x, w, geometry, native=native, bias=bias, dtype=dtype)
        assert torch.equal(y, (y_sums * 0.125 + bias).to(torch.float32).to(dtype))
        dx = conv_input_grad(dy, w, geometry, size, native=native, dtype=dtype)
        assert torch.equal(dx, (dx_sums * 0.5).to(torch.float32).to(dtype))
        dw = conv_weight_grad(dy, x, geometry, native=native, factor=0.5, dtype=dtype)
        assert torch.equal(dw, (dw_sums * 0.5).to(torch.float32).to(dtype))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", list(CASES))
def test_all_three_products_are_exact(name: str, native: bool) -> None:
    shape, size, geometry = CASES[name]
    check(*operands(shape, size, geometry), geometry, size, native)


@pytest.mark.parametrize("name", ["3x3", "7x5 stride 2", "3-d", "1x1", "dilated and strided"])
@pytest.mark.parametrize("wide", [False, True])
def test_work_cut_into_groups_of_images(monkeypatch: pytest.MonkeyPatch, name: str, wide: bool) -> None:
    """Small groups, the last one not full; sums carried over in int32, or in float64 where int32 could overflow."""
    (_, inputs, outputs), size, geometry = CASES[name]
    x, w, dy = operands((5, inputs, outputs), size, geometry)
    if wide:
        monkeypatch.setattr(products, "INT32_TERMS", 3)
    positions = dy.codes[0, ..., 0].numel()
    for images in (1, 2, 3):
        monkeypatch.setattr(convolution, "GATHER_BYTES", images * positions * w.codes[0].numel())
        monkeypatch.setattr(convolution, "image_groups", _groups_without_minimum)
        check(x, w, dy, geometry, size, native=True)


_original_groups = convolution.image_groups


def _groups_without_minimum(images: int, bytes_per_image: int, at_least: int = 0) -> Any:
    return _original_groups(images, bytes_per_image)


LONG = 140_001
"""Terms of a sum of full-scale int8 codes that int32 cannot hold, let alone float32."""
POINT = Geometry(ONE, ONE, ZERO, ONE)
LINE = Geometry((1, 1, 3), ONE, (0, 0, 1), ONE)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("geometry", [POINT, LINE], ids=["pointwise", "line"])
def test_no_sum_of_a_convolution_is_too_long(geometry: Geometry, native: bool, dtype: torch.dtype) -> None:
    """Positions of one image, and channels, of which nobody else cuts the sums."""
    top, taps, one = torch.iinfo(dtype).max, geometry.kernel[2], torch.tensor(1.0)

    def full(*shape: int) -> Codes:
        return Codes(torch.full(shape, top, dtype=dtype), one)

    exact, rounding = LONG * top**2, LONG / 2 * 2**-24 if native and dtype == torch.int16 else 2**-24
    dw = conv_weight_grad(full(1, 1, 1, LONG, 1), full(1, 1, 1, LONG, 1), geometry, native=native)
    y = conv_forward(full(1, *ONE, LONG), full(1, taps, LONG), geometry, native=native)
    dx = conv_input_grad(full(1, *ONE, LONG), full(LONG, taps, 1), geometry, ONE, native=native)
    for found in (dw[0, taps // 2, 0], y, dx):
        assert abs(found.item() / exact - 1) <= rounding


def test_sums_of_grouped_convolutions_are_added_up_exactly_from_image_to_image() -> None:
    """Each image's fits float32, all of them do not; an odd term shows any rounding."""
    geometry, images, positions = Geometry(ONE, ONE, ZERO, ONE, 2), 40, 1000
    x, dy = (torch.full((images, 1, 1, positions, 2), code, dtype=torch.int8) for code in (15, 64))
    dy[0, 0, 0, 0], x[0, 0, 0, 0] = 1, 1
    sums = emulated_weight_grad(dy, x, geometry)
    assert sums.double().flatten().tolist() == [(images * positions - 1) * 15 * 64 + 1] * 2


def test_groups_cover_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "GATHER_BYTES", 100)
    assert list(_original_groups(7, 30)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(_original_groups(7, 30, at_least=150)) == [slice(0, 5), slice(5, 7)]
    assert list(_original_groups(2, 1000)) == [slice(0, 1), slice(1, 2)]
    assert list(_original_groups(0, 10)) == []


@pytest.mark.parametrize("name", list(CASES))
def test_gather_is_advanced_indexing(name: str) -> None:
    shape, size, geometry = CASES[name]
    if geometry.groups > 1:
        return
    x, _, dy = operands(shape, size, geometry)
    out_size, taps = geometry.out_size(size), geometry.taps
    found = gather(x.codes, taps, geometry.stride, out_size)
    assert torch.equal(found, gather_indexed(x.codes, taps, geometry.stride, out_size))
    for phase, kept, offsets in geometry.phases:
        places = [len(range(p, n, s)) for p, n, s in zip(phase, size, geometry.stride, strict=True)]
        if kept.numel() and all(places):
            part = (places[0], places[1], places[2])
            assert torch.equal(gather(dy.codes, offsets, ONE, part), gather_indexed(dy.codes, offsets, ONE, part))


@pytest.mark.parametrize("name", list(CASES))
def test_phases_hold_every_tap_once(name: str) -> None:
    geometry = CASES[name][2]
    kept = torch.cat([kept for _, kept, _ in geometry.phases])
    taps = geometry.kernel[0] * geometry.kernel[1] * geometry.kernel[2]
    if all(d % s for d, s in zip(geometry.dilation, geometry.stride, strict=True) if s > 1):
        assert kept.sort().values.tolist() == list(range(taps))
    assert kept.unique().numel() == taps


@settings(max_examples=60)
@given(data=st.data())
def test_any_convolution(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))

    def axes(low: int, high: int, missing: int) -> Triple:
        z, y, x = (*(missing,) * (3 - dims), *(data.draw(st.integers(low, high)) for _ in range(dims)))
        return z, y, x

    groups = data.draw(st.sampled_from([1, 1, 2]))
    geometry = Geometry(axes(1, 3, 1), axes(1, 3, 1), axes(0, 2, 0), axes(1, 2, 1), groups)
    least = [
        max(1, d * (k - 1) + 1 - 2 * p)
        for k, d, p in zip(geometry.kernel, geometry.dilation, geometry.padding, strict=True)
    ]
    z, y, x = (low + (data.draw(st.integers(0, 4)) if axis >= 3 - dims else 0) for axis, low in enumerate(least))
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    found = operands((shape[0], shape[1] * groups, shape[2] * groups), (z, y, x), geometry)
    check(*found, geometry, (z, y, x), data.draw(st.booleans()))
