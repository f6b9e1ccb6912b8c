"""The geometry of a convolution, and its products by torch's own convolution: of grouped ones, and without int8 units.

Tensors of codes are channels-last with three spatial axes, (N, D, H, W, C); weights are (O, T, C / groups), taps before
channels. int8 codes, and the halves of int16 codes, are exact in whatever torch's convolution makes of float32 (TF32,
bfloat16), and their float32 sums are the integers of the native products as long as they stay below 2^24: for the codes
of LUQ up to :data:`EXACT_TERMS` terms. Longer sums of one image are rounded as in any float32 convolution.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_eff.kernels.int16 import halves
from lightning_eff.kernels.operands import CPU, without_autocast

Triple = tuple[int, int, int]
LARGEST_TERM = 15 * 64
"""Largest magnitude of one term: an unsigned INT4 code times the top FP4 code that fits int8."""
EXACT_TERMS = 2**24 // LARGEST_TERM


@dataclass(frozen=True)
class Geometry:
    """Kernel size, stride, padding and dilation along depth, height and width, and the number of groups."""

    kernel: Triple
    stride: Triple
    padding: Triple
    dilation: Triple
    groups: int = 1

    def out_size(self, size: Sequence[int]) -> Triple:
        """Return the output size for an input of ``size``."""
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
        """Return stride, padding and dilation from ``axis`` on."""
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
        indices, found = torch.arange(math.prod(self.kernel), dtype=torch.int64, device=CPU).view(self.kernel), []
        for z, y, x in itertools.product(*(range(s) for s in self.stride)):
            axes = [self._phase_axis(axis, phase) for axis, phase in enumerate((z, y, x))]
            kept = indices
            for axis, (taps, _) in enumerate(axes):
                kept = kept.index_select(axis, torch.tensor(taps, dtype=torch.int64, device=CPU))
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
    offsets = (torch.tensor(axis, dtype=torch.int64, device=CPU) for axis in axes)
    return torch.stack([t.reshape(-1) for t in torch.meshgrid(*offsets, indexing="ij")]).contiguous()


def _axes(geometry: Geometry, depth: int) -> int:
    """The first axis torch's convolution needs: 1 where depth is 1 throughout, else 0."""
    return int(depth == 1 and geometry.kernel[0] == 1 and geometry.padding[0] == 0)


def _arithmetic(codes: Tensor) -> torch.dtype:
    """Values are multiplied in the type they come in, integer codes in float32."""
    return codes.dtype if codes.is_floating_point() else torch.float32


def _image(codes: Tensor, axes: int) -> Tensor:
    """Values (N, D, H, W, C) -> (N, C, *axes), channels-last strides."""
    wide = codes.permute(0, 4, 1, 2, 3)
    return wide.squeeze(2) if axes else wide


def _codes_layout(image: Tensor, axes: int) -> Tensor:
    """Undo :func:`_image`, contiguous."""
    return (image.unsqueeze(2) if axes else image).permute(0, 2, 3, 4, 1).contiguous()


def _kernel(codes: Tensor, geometry: Geometry, axes: int) -> Tensor:
    """Values (O, T, C / groups) -> (O, C / groups, *axes)."""
    channels, _, inputs = codes.shape
    return codes.transpose(1, 2).reshape(channels, inputs, *geometry.kernel[axes:])


def _backward(grad: Tensor, image: Tensor, kernel: Tensor, geometry: Geometry, axes: int, which: int) -> Tensor:
    """Input gradient (``which`` 0) or weight gradient (1) of torch's convolution."""
    mask = [which == 0, which == 1, False]
    stride, padding, dilation = geometry.along(axes)
    grads = torch.ops.aten.convolution_backward(
        grad, image, kernel, None, stride, padding, dilation, False, [0] * len(stride), geometry.groups, mask
    )
    result: Tensor = grads[which]
    return result


def _in_halves(run: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """``run(a, b)``, linear in both, of codes; those of int16 in halves, whose results are added up in float32."""
    if a.dtype != b.dtype and a.is_floating_point():  # sums are to stay float32
        a, b = a.to(torch.float32), b.to(torch.float32)
    with without_autocast(a):
        upper, *others = ((p * q, run(x, y)) for p, x in halves(a) for q, y in halves(b))
    total = upper[1] if not others else upper[1].mul_(upper[0])
    for factor, part in others:
        total.add_(part, alpha=factor)
    return total


def emulated_forward(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the sums of the output, (N, D', H', W', O): float32, or bfloat16 of bfloat16 values."""
    axes = _axes(geometry, x.shape[1])
    stride, padding, dilation = geometry.along(axes)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        convolve = torch.conv2d if axes else torch.conv3d
        image, kernel = _image(x, axes), _kernel(weight, geometry, axes)
        return convolve(image, kernel, None, stride, padding, dilation, geometry.groups)

    return _codes_layout(_in_halves(run, x, weight), axes)


def emulated_input_grad(grad: Tensor, weight: Tensor, geometry: Geometry, size: Triple) -> Tensor:
    """Return the sums of the input gradient, (N, D, H, W, C); types as in :func:`emulated_forward`."""
    axes = _axes(geometry, size[0])
    shape = (grad.shape[0], *size, weight.shape[2] * geometry.groups)
    image = _image(grad.new_empty(shape, dtype=_arithmetic(grad)), axes)  # of which torch looks at shape and strides

    def run(grad: Tensor, weight: Tensor) -> Tensor:
        return _backward(_image(grad, axes), image, _kernel(weight, geometry, axes), geometry, axes, 0)

    return _codes_layout(_in_halves(run, grad, weight), axes)


def emulated_weight_grad(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """Return the sums of the weight gradient, (O, T, C / groups), contiguous; types as in :func:`emulated_forward`.

    From one group of images to the next integers are added up in float64, which is returned then.
    """
    axes = _axes(geometry, x.shape[1])
    shape = (grad.shape[-1], x.shape[-1] // geometry.groups, *geometry.kernel[axes:])
    kernel = grad.new_empty((), dtype=_arithmetic(grad)).expand(shape)

    def run(grad: Tensor, x: Tensor) -> Tensor:
        return _backward(_image(grad, axes), _image(x, axes), kernel, geometry, axes, 1)

    images, positions = grad.shape[0], math.prod(grad.shape[1:4])
    if x.is_floating_point() or images * positions <= EXACT_TERMS:
        return _in_halves(run, grad, x).flatten(2).transpose(1, 2).contiguous()
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    size = max(1, EXACT_TERMS // positions)
    parts = (_in_halves(run, g, i).to(wide) for g, i in zip(grad.split(size), x.split(size), strict=True))
    return functools.reduce(Tensor.add_, parts).flatten(2).transpose(1, 2).contiguous()
