"""Opaque operators for torch.compile: ``lightning_eff::linear``, ``conv`` and their backwards.

A compiled graph carries tensors alone, so a layer's state travels as a 0-d handle tensor. The weight's codes stay in
that state: an operator must not hand out a cached tensor that the compiler believes it owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_eff.errors import InternalError
from lightning_eff.kernels.geometry import Geometry, shared_geometry
from lightning_eff.kernels.layout import images
from lightning_eff.precision.formats.base import SavedInput
from lightning_eff.precision.layers import autograd as functions
from lightning_eff.precision.layers.state import state_of

Outputs = tuple[Tensor, Tensor, Tensor]


def _geometry(numbers: Sequence[int]) -> Geometry:
    kernel, stride, padding, dilation = (functions.triple(numbers[i : i + 3], 1) for i in (0, 3, 6, 9))
    return shared_geometry(kernel, stride, padding, dilation, numbers[12])


def _outputs(y: Tensor, saved: SavedInput | None, dtype: torch.dtype) -> Outputs:
    if saved is None:  # pragma: no cover - save=True always returns the codes
        raise InternalError("internal error: the input was not saved")
    return y.to(dtype), saved.packed, saved.scale


def _fake_outputs(y: Tensor, x: Tensor, nibbles: int, scales: int) -> Outputs:
    packed = x.new_empty(((x.numel() * nibbles + 1) // 2,), dtype=torch.uint8)
    return y, packed, x.new_empty((scales,), dtype=torch.float32)


@torch.library.custom_op("lightning_eff::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    handle: Tensor,
    dtype: torch.dtype,
    nibbles: int,
    scales: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a quantised linear map's output, packed input and its scales."""
    y, saved, _ = functions.linear_forward(x, weight, bias, state_of(handle), save=True, share=False)
    return _outputs(y, saved, dtype)


@linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    handle: Tensor,
    dtype: torch.dtype,
    nibbles: int,
    scales: int,
) -> Outputs:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
    return _fake_outputs(y, x, nibbles, scales)


@torch.library.custom_op("lightning_eff::linear_backward", mutates_args=())
def linear_backward(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    weight: Tensor,
    handle: Tensor,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by input, weight and bias."""
    state = state_of(handle)
    saved, codes = SavedInput(packed, scale), state.encode_weight(weight)
    return _all(functions.linear_backward(grad, saved, codes, state, x_dtype, w_dtype, (True, True, True)))


@linear_backward.register_fake
def _(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    weight: Tensor,
    handle: Tensor,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs, inputs = weight.shape
    dx = grad.new_empty((*grad.shape[:-1], inputs), dtype=x_dtype)
    return dx, grad.new_empty((outputs, inputs), dtype=w_dtype), grad.new_empty((outputs,), dtype=w_dtype)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, weight, bias, handle, *_ = inputs
    ctx.save_for_backward(*output[1:], weight, handle)
    ctx.dtypes, ctx.has_bias = (x.dtype, weight.dtype), bias is not None


def _linear_grads(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dw, db = torch.ops.lightning_eff.linear_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.dtypes)
    return dx, dw, db if ctx.has_bias else None, None, None, None, None


linear.register_autograd(_linear_grads, setup_context=_linear_setup)


@torch.library.custom_op("lightning_eff::conv", mutates_args=())
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    handle: Tensor,
    geometry: Sequence[int],
    keep_last: bool,
    dtype: torch.dtype,
    nibbles: int,
    scales: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a quantised convolution's output, packed input and its scale."""
    state = state_of(handle)
    y, saved, _ = functions.conv_forward_last(
        x, weight, bias, state, _geometry(geometry), save=True, keep_last=keep_last, share=False
    )
    return _outputs(y, saved, dtype)


def _empty(x: Tensor, shape: Sequence[int], dtype: torch.dtype, *, keep_last: bool) -> Tensor:
    """Return an empty (N, C, *space) tensor of that memory format."""
    made = (shape[0], *shape[2:], shape[1]) if keep_last else shape
    return images(x.new_empty(made, dtype=dtype), shape[2:], last=keep_last)


@conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    handle: Tensor,
    geometry: Sequence[int],
    keep_last: bool,
    dtype: torch.dtype,
    nibbles: int,
    scales: int,
) -> Outputs:
    dims = x.dim() - 2
    size = _geometry(geometry).out_size(functions.triple(x.shape[2:], 1))[3 - dims :]
    y = _empty(x, (x.shape[0], weight.shape[0], *size), dtype, keep_last=keep_last)
    return _fake_outputs(y, x, nibbles, scales)


@torch.library.custom_op("lightning_eff::conv_backward", mutates_args=())
def conv_backward(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    weight: Tensor,
    handle: Tensor,
    geometry: Sequence[int],
    x_shape: Sequence[int],
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    keep_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by input, weight and bias."""
    state = state_of(handle)
    grads = functions.conv_backward_last(
        grad,
        SavedInput(packed, scale),
        functions.encode_kernel(weight, state),
        state,
        _geometry(geometry),
        torch.Size(x_shape),
        weight.shape,
        x_dtype,
        w_dtype,
        (True, True, True),
        keep_last=keep_last,
    )
    return _all(grads)


@conv_backward.register_fake
def _(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    weight: Tensor,
    handle: Tensor,
    geometry: Sequence[int],
    x_shape: Sequence[int],
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    keep_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = _empty(grad, x_shape, x_dtype, keep_last=keep_last)
    dw = _empty(grad, weight.shape, w_dtype, keep_last=keep_last)
    return dx, dw, grad.new_empty((weight.shape[0],), dtype=w_dtype)


def _all(grads: functions.Grads) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, db = grads
    if dx is None or dw is None or db is None:  # every gradient was asked for
        raise InternalError("internal error: a gradient is missing")
    return dx, dw, db


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, weight, bias, handle, geometry, keep_last, *_ = inputs
    ctx.save_for_backward(*output[1:], weight, handle)
    ctx.rest = (geometry, x.shape, x.dtype, weight.dtype, keep_last)
    ctx.has_bias = bias is not None


def _conv_grads(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dw, db = torch.ops.lightning_eff.conv_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return dx, dw, db if ctx.has_bias else None, None, None, None, None, None, None


conv.register_autograd(_conv_grads, setup_context=_conv_setup)
