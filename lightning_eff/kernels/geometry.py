"""The geometry of a convolution, and its products in float32 where there are no int8 units.

Tensors of codes are channels-last with three spatial axes, (N, D, H, W, C); weights are (O, T, C / groups), taps before
channels. The float32 sums are the integers of the native products as long as they stay below 2^24.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """Kernel size, stride, padding and dilation along depth, height and width, and the number of groups."""

    kernel: Triple
    stride: Triple
    padding: Triple
    dilation: Triple
    groups: int = 1

    def out_size(self, size: Sequence[int]) -> Triple:
        """Output size for an input of ``size``."""
        z, y, x = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        return z, y, x

    @property
    def pointwise(self) -> bool:
        """A 1x1 convolution without stride or padding: the input is its own gather."""
        return self.kernel == (1, 1, 1) and self.stride == (1, 1, 1) and self.padding == (0, 0, 0)

    def along(self, axis: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Stride, padding and dilation from ``axis`` on."""
        return self.stride[axis:], self.padding[axis:], self.dilation[axis:]

    @functools.cached_property
    def taps(self) -> Tensor:
        """(3, T) offsets of the taps relative to ``o * stride``."""
        return _grid(
            [[k * d - p for k in range(n)] for n, p, d in zip(self.kernel, self.padding, self.dilation, strict=True)]
        )

    @functools.cached_property
    def phases(self) -> list[tuple[Triple, Tensor, Tensor]]:
        """For each input position modulo the stride: the phase, its taps' indices and their (3, T') output offsets."""
        indices, found = torch.arange(self.kernel[0] * self.kernel[1] * self.kernel[2]).view(self.kernel), []
        for z, y, x in itertools.product(*(range(s) for s in self.stride)):
            axes = [self._phase_axis(axis, phase) for axis, phase in enumerate((z, y, x))]
            kept = indices
            for axis, (taps, _) in enumerate(axes):
                kept = kept.index_select(axis, torch.tensor(taps, dtype=torch.int64))
            found.append(((z, y, x), kept.reshape(-1), _grid([offsets for _, offsets in axes])))
        return found

    def _phase_axis(self, axis: int, phase: int) -> tuple[list[int], list[int]]:
        """Taps along one axis that reach this phase, and the output offset of each."""
        taps, offsets = [], []
        for k in range(self.kernel[axis]):
            offset, rest = divmod(phase + self.padding[axis] - k * self.dilation[axis], self.stride[axis])
            if rest == 0:
                taps.append(k)
                offsets.append(offset)
        return taps, offsets


shared_geometry = functools.lru_cache(maxsize=4096)(Geometry)
"""A :class:`Geometry` that is made, and its offsets computed, once for equal arguments."""


def _grid(axes: Sequence[Sequence[int]]) -> Tensor:
    """All combinations of three lists of offsets, (3, product of lengths)."""
    return torch.stack(
        [t.reshape(-1) for t in torch.meshgrid(*(torch.tensor(a, dtype=torch.int64) for a in axes), indexing="ij")]
    ).contiguous()


def _axes(geometry: Geometry, depth: int) -> int:
    """The first axis torch's convolution needs: 1 where depth is 1 throughout, else 0."""
    return int(depth == 1 and geometry.kernel[0] == 1 and geometry.padding[0] == 0)


def _arithmetic(codes: Tensor) -> torch.dtype:
    """FP8 values are exact in bfloat16, integer codes in float32."""
    return torch.bfloat16 if codes.is_floating_point() and codes.dtype is not torch.float32 else torch.float32


def _image(codes: Tensor, axes: int) -> Tensor:
    """(N, D, H, W, C) -> float32 (bfloat16 stays) (N, C, *axes), channels-last strides."""
    wide = codes.to(_arithmetic(codes)).permute(0, 4, 1, 2, 3)
    return wide.squeeze(2) if axes else wide


def _codes_layout(image: Tensor, axes: int) -> Tensor:
    """Undo :func:`_image`, contiguous."""
    return (image.unsqueeze(2) if axes else image).permute(0, 2, 3, 4, 1).contiguous()


def _kernel(codes: Tensor, geometry: Geometry, axes: int) -> Tensor:
    """(O, T, C / groups) -> float32 (bfloat16 stays) (O, C / groups, *axes)."""
    channels, _, inputs = codes.shape
    return codes.to(_arithmetic(codes)).transpose(1, 2).reshape(channels, inputs, *geometry.kernel[axes:])


def _backward(grad: Tensor, image: Tensor, kernel: Tensor, geometry: Geometry, axes: int, which: int) -> Tensor:
    """Input gradient (``which`` 0) or weight gradient (1) of torch's convolution."""
    mask = [which == 0, which == 1, False]
    stride, padding, dilation = geometry.along(axes)
    grads = torch.ops.aten.convolution_backward(
        grad, image, kernel, None, stride, padding, dilation, False, [0] * len(stride), geometry.groups, mask
    )
    result: Tensor = grads[which]
    return result


def emulated_forward(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Integer sums of the output, float32 (N, D', H', W', O)."""
    axes = _axes(geometry, x.shape[1])
    run = torch.conv2d if axes else torch.conv3d
    stride, padding, dilation = geometry.along(axes)
    image, kernel = _image(x, axes), _kernel(weight, geometry, axes)
    return _codes_layout(run(image, kernel, None, stride, padding, dilation, geometry.groups), axes)


def emulated_input_grad(grad: Tensor, weight: Tensor, geometry: Geometry, size: Triple) -> Tensor:
    """Integer sums of the input gradient, float32 (N, D, H, W, C)."""
    axes = _axes(geometry, size[0])
    shape = (grad.shape[0], weight.shape[2] * geometry.groups, *size[axes:])
    image = grad.new_empty((), dtype=_arithmetic(grad)).expand(shape)
    sums = _backward(_image(grad, axes), image, _kernel(weight, geometry, axes), geometry, axes, 0)
    return _codes_layout(sums, axes)


def emulated_weight_grad(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """Integer sums of the weight gradient, float32 (O, T, C / groups), contiguous."""
    axes = _axes(geometry, x.shape[1])
    shape = (grad.shape[-1], x.shape[-1] // geometry.groups, *geometry.kernel[axes:])
    kernel = grad.new_empty((), dtype=_arithmetic(grad)).expand(shape)
    sums = _backward(_image(grad, axes), _image(x, axes), kernel, geometry, axes, 1)
    return sums.flatten(2).transpose(1, 2).contiguous()
