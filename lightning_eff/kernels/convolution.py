"""Convolutions of integer codes as exact products: gather the receptive fields in int8, multiply, rescale.

Tensors are channels-last with three spatial axes; a 2-d convolution has depth 1, a 1-d one depth and height 1.
All three products of a training step are stride-1 or strided gathers followed by one GEMM:

* output:  gather the input at ``o * stride + k * dilation - padding``, times the weight;
* input gradient: for each phase of the stride, only the taps that reach it; gather the output gradient, times the
  weight of those taps (no zeros inserted between gradients);
* weight gradient: output gradient transposed, times the gathered input.

Work is cut into groups of images whose gathered codes stay in the cache. Legend: N images, C input channels,
O output channels, T taps, P output positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_eff.functional.codes import Codes
from lightning_eff.kernels.geometry import (
    EXACT_TERMS,
    Geometry,
    Triple,
    emulated_forward,
    emulated_input_grad,
    emulated_weight_grad,
)
from lightning_eff.kernels.layout import transpose
from lightning_eff.kernels.operands import CPU, kernels_for, pointer, threads
from lightning_eff.kernels.products import code_product, rescale, scratch, sum_of_products

GATHER_BYTES = 4 << 20
"""Gathered codes per group of images; measured: 1 MiB and 16 MiB are both slower."""


def gather(src: Tensor, taps: Tensor, step: Triple, out_size: Triple) -> Tensor:
    """Gather codes (N, D, H, W, C) -> (N * positions, T * C): the values under each tap, zero outside.

    Args:
        src: contiguous channels-last codes.
        taps: (3, T) offsets.
        step: distance between two output positions.
        out_size: output positions along each axis.
    """
    images, *size, channels = src.shape
    positions, count = images * out_size[0] * out_size[1] * out_size[2], taps.shape[1]
    kernels = kernels_for(src, taps) if src.dtype in (torch.int8, torch.int16) else None
    if kernels is None:
        return gather_indexed(src, taps, step, out_size)
    if src.dtype == torch.int16:  # two bytes are two channels to the kernel
        return gather(src.view(torch.int8), taps, step, out_size).view(torch.int16)
    out = scratch("gather", positions * count * channels, torch.int8).view(positions, count * channels)
    shape = torch.tensor([*size, *out_size, *step], dtype=torch.int64, device=CPU)
    kernels.eff_gather(
        pointer("eff_gather(src)", src, src.numel(), torch.int8),
        images,
        pointer("eff_gather(size)", shape, 3, torch.int64),
        channels,
        pointer("eff_gather(out_size)", shape[3:], 3, torch.int64),
        pointer("eff_gather(step)", shape[6:], 3, torch.int64),
        count,
        pointer("eff_gather(tap)", taps, 3 * count, torch.int64),
        pointer("eff_gather(out)", out, positions * count * channels, torch.int8),
        threads(),
    )
    return out


def gather_indexed(src: Tensor, taps: Tensor, step: Triple, out_size: Triple) -> Tensor:
    """Do as :func:`gather` by advanced indexing, for any device and dtype."""
    inside = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=src.device)
    places = []
    for axis in range(3):
        view = [1, 1, 1, taps.shape[1]]
        view[axis] = out_size[axis]
        place = torch.arange(out_size[axis], dtype=torch.int64, device=CPU)[:, None] * step[axis] + taps[axis]
        place = place.to(src.device).view(view)
        inside = inside & (place >= 0) & (place < src.shape[axis + 1])
        places.append(place.clamp(0, src.shape[axis + 1] - 1))
    out = src[:, places[0], places[1], places[2]] * inside[..., None].to(src.dtype)
    return out.reshape(-1, taps.shape[1] * src.shape[-1])


def image_groups(images: int, bytes_per_image: int, at_least: int = 0) -> Iterator[slice]:
    """Yield groups of images that gather :data:`GATHER_BYTES`, or ``at_least`` bytes if groups have a fixed cost."""
    size = max(1, max(GATHER_BYTES, at_least) // max(bytes_per_image, 1))
    return (slice(start, min(start + size, images)) for start in range(0, images, size))


def _gathers(a: Tensor, b: Tensor, native: bool, geometry: Geometry, terms: int) -> bool:
    """Whether to gather and multiply matrices: on integer units, or where torch's own convolution might round.

    Grouped convolutions and those of values (FP8, bfloat16) are left to torch. But where sums of values are to stay
    float32 torch makes matrix products of 1x1 convolutions, whose sums follow set_float32_matmul_precision.
    """
    if geometry.groups > 1:
        return False
    if a.is_floating_point():
        return a.dtype != b.dtype and geometry.kernel == (1, 1, 1)
    return native or not a.dtype == b.dtype == torch.int8 or terms > EXACT_TERMS


def _columns(x: Tensor, geometry: Geometry, taps: Tensor, out_size: Triple) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if geometry.pointwise else gather(x, taps, geometry.stride, out_size)


def _write(acc: Tensor, a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None, keep_last: bool) -> None:
    """Rescale sums (images * positions, channels) into ``out``, images of it few enough to lie in the cache."""
    if keep_last:
        rescale(acc, a, b, bias=bias, dtype=out.dtype, out=out.view(acc.shape))
        return
    room = scratch("rows", acc.numel(), out.dtype).view(acc.shape) if acc.is_cpu else None
    rows = rescale(acc, a, b, bias=bias, dtype=out.dtype, out=room)
    transpose(rows.view(out.shape[0], -1, out.shape[1]), out.view(*out.shape[:2], -1))


def _write_all(
    acc: Tensor, a: Tensor, b: Tensor, *, bias: Tensor | None, dtype: torch.dtype, keep_last: bool
) -> Tensor:
    """Rescale the sums (N, D, H, W, C) of a whole convolution into a new tensor."""
    images, *size, channels = acc.shape
    out = _new(images, size, channels, dtype, acc.device, keep_last=keep_last)
    for group in image_groups(images, acc[:1].numel() * 4):
        _write(acc[group].flatten(0, 3), a, b, out[group], bias=bias, keep_last=keep_last)
    return out


def _new(
    images: int, size: Sequence[int], channels: int, dtype: torch.dtype, device: torch.device, *, keep_last: bool
) -> Tensor:
    shape = (images, *size, channels) if keep_last else (images, channels, *size)
    return torch.empty(shape, dtype=dtype, device=device)


def conv_forward(
    x: Codes,
    weight: Codes,
    geometry: Geometry,
    *,
    native: bool,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    keep_last: bool = True,
) -> Tensor:
    """Return the convolution's output, (N, D', H', W', O), or (N, O, D', H', W') without ``keep_last``; contiguous.

    Args:
        x: codes (N, D, H, W, C).
        weight: codes (O, T, C / groups).
        geometry: of the convolution.
        native: use the int8 units (never for grouped convolutions).
        bias: (O,) or ``None``.
        dtype: of the result.
        keep_last: leave the result channels-last, the order in which it is made.
    """
    if not _gathers(x.codes, weight.codes, native, geometry, weight.codes[0].numel()):
        acc = emulated_forward(x.codes, weight.codes, geometry)
        return _write_all(acc, x.scale, weight.scale, bias=bias, dtype=dtype, keep_last=keep_last)
    images, out_size, channels = x.codes.shape[0], geometry.out_size(x.codes.shape[1:4]), weight.codes.shape[0]
    positions, matrix = out_size[0] * out_size[1] * out_size[2], weight.codes.view(channels, -1).t()
    out = _new(images, out_size, channels, dtype, x.codes.device, keep_last=keep_last)
    taps = geometry.taps
    for group in image_groups(images, positions * matrix.shape[0] * x.codes.itemsize):
        acc = code_product(_columns(x.codes[group], geometry, taps, out_size), matrix, native=native)
        _write(acc, x.scale, weight.scale, out[group], bias=bias, keep_last=keep_last)
    return out


def conv_input_grad(
    grad: Codes,
    weight: Codes,
    geometry: Geometry,
    size: Triple,
    *,
    native: bool,
    dtype: torch.dtype = torch.float32,
    keep_last: bool = True,
) -> Tensor:
    """Return the gradient of the input, (N, D, H, W, C), or (N, C, D, H, W) without ``keep_last``; contiguous.

    Args:
        grad: codes of the output gradient (N, D', H', W', O).
        weight: codes (O, T, C / groups).
        geometry: of the convolution.
        size: (D, H, W) of the input.
        native: use the int8 units (never for grouped convolutions).
        dtype: of the result.
        keep_last: leave the result channels-last, the order in which it is made.
    """
    images, (channels, _, inputs) = grad.codes.shape[0], weight.codes.shape
    if not _gathers(grad.codes, weight.codes, native, geometry, channels * geometry.taps.shape[1]):
        acc = emulated_input_grad(grad.codes, weight.codes, geometry, size)
        return _write_all(acc, grad.scale, weight.scale, bias=None, dtype=dtype, keep_last=keep_last)
    single = geometry.stride == (1, 1, 1)
    result = _new(images, size, inputs, dtype, grad.codes.device, keep_last=keep_last)
    result = result if single else result.zero_()
    last = result if keep_last else result.movedim(1, -1)
    for phase, kept, taps in geometry.phases:
        part = tuple(slice(p, None, s) for p, s in zip(phase, geometry.stride, strict=True))
        target = last[(slice(None), *part)]
        if kept.numel() == 0 or target.numel() == 0:
            continue
        matrix = weight.codes[:, kept].permute(1, 0, 2).reshape(-1, inputs)
        z, y, x = target.shape[1:4]
        for group in image_groups(images, z * y * x * matrix.shape[0] * grad.codes.itemsize):
            codes = grad.codes[group]
            columns = codes.reshape(-1, channels) if geometry.pointwise else gather(codes, taps, (1, 1, 1), (z, y, x))
            acc = code_product(columns, matrix, native=native)
            if single:
                _write(acc, grad.scale, weight.scale, result[group], bias=None, keep_last=keep_last)
            else:
                target[group] = rescale(acc, grad.scale, weight.scale, dtype=dtype).view(-1, z, y, x, inputs)
    return result


def conv_weight_grad(
    grad: Codes, x: Codes, geometry: Geometry, *, native: bool, factor: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the gradient of the weight, (O, T, C / groups).

    Args:
        grad: codes of the output gradient (N, D', H', W', O).
        x: codes of the input (N, D, H, W, C).
        geometry: of the convolution.
        native: use the int8 units (never for grouped convolutions).
        factor: multiplies the result.
        dtype: of the result.
    """
    images, *out_size, channels = grad.codes.shape
    taps = geometry.taps
    inputs = x.codes.shape[-1] // geometry.groups
    positions, width = out_size[0] * out_size[1] * out_size[2], taps.shape[1] * inputs
    if not _gathers(grad.codes, x.codes, native, geometry, images * positions):
        acc = emulated_weight_grad(grad.codes, x.codes, geometry).view(channels, width)
        return rescale(acc, grad.scale, x.scale, factor=factor, dtype=dtype).view(channels, -1, inputs)
    total = sum_of_products(
        (
            (
                grad.codes[group].reshape(-1, channels).t(),
                _columns(x.codes[group], geometry, taps, (out_size[0], out_size[1], out_size[2])),
            )
            for group in image_groups(images, positions * width * x.codes.itemsize, at_least=8 * channels * width)
        ),
        native=native,
    )
    total = torch.zeros(channels, width, dtype=torch.int32, device=x.codes.device) if total is None else total
    return rescale(total, grad.scale, x.scale, factor=factor, dtype=dtype).view(channels, -1, inputs)
