"""The quantised linear map and convolution: one forward and one backward each, for eager mode and for torch.compile.

                                     luq4            fp8
    y  = Qa(x) Qw(w)^T + b          INT4 x INT4     E4M3 x E4M3
    dx = Qg(dy) Qw(w)               FP4 x INT4      E5M2 x E4M3
    dw = mean_n Qg_n(dy)^T Qa(x)    FP4 x INT4      E5M2 x E4M3, over the samples of a gradient
    db = sum of dy over the rows    float32

    x (rows, I) input, w (O, I) weight, b (O,) bias, y (rows, O) output; d. is the gradient of the loss by what follows.
    Qa, Qw and Qg are the format's quantisers of activations, weights and gradients. A convolution's are the same, with
    the patches of x as rows.

Kept for backward: the packed codes Qa(x) with their scale. The bias gradient is the exact sum of dy. Gradients pass the
quantisers of x and w unchanged (straight-through).

In eager mode an ``autograd.Function`` runs the products. While torch.compile traces, the same code is reached through
opaque operators of the ``lightning_eff`` namespace, so a compiled submodule has no graph break.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from lightning_eff.errors import UnsupportedLayerError
from lightning_eff.functional.codes import Codes
from lightning_eff.kernels.convolution import conv_forward, conv_input_grad, conv_weight_grad
from lightning_eff.kernels.geometry import Geometry, Triple
from lightning_eff.kernels.layout import channels_last, images
from lightning_eff.kernels.products import scaled_product
from lightning_eff.precision.formats.base import SavedInput, WeightCodes
from lightning_eff.precision.layers.state import LayerState

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def _result_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _owned(y: Tensor) -> Tensor:
    """Return ``y`` as a tensor that is no view: a Function's output that is one must not be written to in place."""
    if not y._is_view():
        return y
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())


def _refuse_double_backward(state: LayerState) -> None:
    if torch.is_grad_enabled():  # create_graph=True: the result would silently lack its own gradient
        raise UnsupportedLayerError(
            f"{state.name}: a gradient of a gradient (create_graph=True, gradient penalties) is not defined through "
            f"quantised products. Leave the layer in high precision: exempt=[{state.name!r}]."
        )


# ---------------------------------------------------------------------------------------------------------- linear


def _to_rows(x: Tensor) -> Tensor:
    """Reshape (..., I) to (rows, I)."""
    return x.reshape(-1, x.shape[-1])


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: LayerState, *, save: bool, share: bool = True
) -> tuple[Tensor, SavedInput | None, WeightCodes]:
    """Compute y of a linear map; return it, what backward needs of x, and the weight's codes.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,).
        state: of the layer.
        save: keep what backward needs of x.
        share: take the codes of x from a layer that read it before.
    """
    dtype = _result_dtype(x)
    with _no_autocast(x):
        codes, saved = state.encode_input(x, _to_rows, save=save, share=share)  # Qa(x)
        matrix = state.encode_weight(weight)  # Qw(w)
        native = state.native(x.device)
        y = scaled_product(codes, matrix.forward.t(), native=native, bias=bias, dtype=dtype)  # Qa(x) Qw(w)^T + b
        y = state.store(y, "output")
    return y.view(*x.shape[:-1], weight.shape[0]), saved, matrix


def linear_backward(
    grad: Tensor,
    saved: SavedInput | None,
    weight: WeightCodes,
    state: LayerState,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> Grads:
    """Return the gradients of a linear map by input, weight and bias; ``None`` where not needed.

    Args:
        grad: dy, (..., O).
        saved: what the forward kept of x; None where the weight needs no gradient.
        weight: the codes the forward used.
        state: of the layer.
        x_dtype: dtype of dx.
        w_dtype: dtype of dw and db.
        needs: which of dx, dw and db are needed.
    """
    outputs, inputs = weight.backward.codes.shape
    flat = grad.reshape(-1, outputs)
    native = state.native(grad.device)
    dx = dw = None
    if needs[0] or needs[1]:
        codes = state.encode_grad(flat)  # Qg(dy)
    if needs[0]:  # dx = Qg(dy) Qw(w)
        dx = scaled_product(codes.to_input, weight.backward, native=native, dtype=x_dtype)
        dx = state.store(dx, "input_grad").view(*grad.shape[:-1], inputs)
    if needs[1] and saved is not None:  # dw = mean_n Qg_n(dy)^T Qa(x)
        x = state.restore_input(saved, (flat.shape[0], inputs))
        samples = codes.to_weight
        factor = 1 / len(samples)
        parts = [scaled_product(s.t(), x, native=native, factor=factor, dtype=w_dtype) for s in samples]
        dw = state.store(functools.reduce(Tensor.add_, parts), "weight_grad")
    db = flat.sum(0, dtype=torch.float32).to(w_dtype) if needs[2] else None
    return dx, dw, db


class LinearFunction(torch.autograd.Function):
    """Records the quantised linear map in eager mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: LayerState, train: bool) -> Tensor:
        """See :func:`linear_forward`; ``train`` is whether gradients are being recorded."""
        y, saved, ctx.codes = linear_forward(x, weight, bias, state, save=train and weight.requires_grad)
        ctx.state, ctx.dtypes = state, (x.dtype, weight.dtype)
        ctx.save_for_backward(*(saved or ()))
        return _owned(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See :func:`linear_backward`."""
        _refuse_double_backward(ctx.state)
        tensors = ctx.saved_tensors  # read once: activation checkpointing recomputes on every read
        saved = SavedInput(*tensors) if tensors else None
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        with _no_autocast(grad):
            x_dtype, w_dtype = ctx.dtypes
            grads = linear_backward(grad, saved, ctx.codes, ctx.state, x_dtype, w_dtype, needs)
        return *grads, None, None


def quantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None, state: LayerState) -> Tensor:
    """Return the quantised ``x @ weight.T + bias``; shapes as :func:`torch.nn.functional.linear`."""
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.lightning_eff.linear(
            x,
            weight,
            bias,
            state.handle,
            _result_dtype(x),
            state.format.nibbles,
            state.format.saved_scales(weight.shape[1]),
        )[0]
        return y
    result: Tensor = LinearFunction.apply(x, weight, bias, state, torch.is_grad_enabled())
    return result


# ----------------------------------------------------------------------------------------------------- convolution


def _taps_before_channels(weight: Tensor) -> Tensor:
    """Arrange (O, C, *kernel) as (O, T, C)."""
    return weight.flatten(2).transpose(1, 2)


def _to_last(x: Tensor) -> Tensor:
    """Arrange (N, C, *space) as contiguous (N, D, H, W, C), missing axes of size 1 in front."""
    x = channels_last(x)
    return x.view(x.shape[0], *(1,) * (5 - x.dim()), *x.shape[1:])


def triple(values: Sequence[int], missing: int) -> Triple:
    """Return values of one to three axes as those of three, ``missing`` for the axes in front that are not there."""
    z, y, x = (*(missing,) * (3 - len(values)), *values)
    return z, y, x


def channels_last_result(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
    """Return whether torch's convolution of these tensors, and its gradients, are channels-last or contiguous."""
    dims = x.dim() - 2
    if dims == 1:
        return False
    if torch.compiler.is_compiling():
        return any(suggest_memory_format(t) is not torch.contiguous_format for t in (x, weight))
    stride, padding, dilation = geometry.along(3 - dims)
    sizes = None if bias is None else [bias.numel()]
    shape = (stride, padding, dilation, False, (0,) * dims, geometry.groups)
    backend = torch._C._select_conv_backend(x, weight, bias, *shape, sizes)
    return torch._C._conv_determine_backend_memory_format(x, weight, backend) is not torch.contiguous_format


def encode_kernel(weight: Tensor, state: LayerState) -> Codes:
    """Encode a convolution's weight as (O, T, C / groups)."""
    return state.encode_weight(weight, arrange=_taps_before_channels).forward


def conv_forward_last(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: LayerState,
    geometry: Geometry,
    *,
    save: bool,
    keep_last: bool,
    share: bool = True,
) -> tuple[Tensor, SavedInput | None, Codes]:
    """Compute y of a convolution; return it, what backward needs of x, and the weight's codes.

    Args:
        x: (N, C, *space).
        weight: (O, C / groups, *kernel).
        bias: (O,).
        state: of the layer.
        geometry: kernel, stride, padding, dilation and groups.
        save: keep what backward needs of x.
        keep_last: make the output channels-last, see :func:`channels_last_result`.
        share: take the codes of x from a layer that read it before.
    """
    dtype = _result_dtype(x)
    with _no_autocast(x):
        codes, saved = state.encode_input(x, _to_last, save=save, share=share)  # Qa(x)
        kernel = encode_kernel(weight, state)  # Qw(w)
        native = state.native(x.device)
        # y = Qa(x) Qw(w)^T + b over the patches of x
        y = conv_forward(codes, kernel, geometry, native=native, bias=bias, dtype=dtype, keep_last=keep_last)
        y = state.store(y, "output")
    space = y.shape[1:-1] if keep_last else y.shape[2:]
    return images(y, space[5 - x.dim() :], last=keep_last), saved, kernel


def conv_backward_last(
    grad: Tensor,
    saved: SavedInput | None,
    kernel: Codes,
    state: LayerState,
    geometry: Geometry,
    x_shape: torch.Size,
    weight_shape: torch.Size,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
    *,
    keep_last: bool,
) -> Grads:
    """Return the gradients of a convolution by input, weight and bias; ``None`` where not needed.

    Args:
        grad: dy, (N, O, *space').
        saved: what the forward kept of x; None where the weight needs no gradient.
        kernel: the weight's codes.
        state: of the layer.
        geometry: kernel, stride, padding, dilation and groups.
        x_shape: of the input.
        weight_shape: of the weight.
        x_dtype: dtype of dx.
        w_dtype: dtype of dw and db.
        needs: which of dx, dw and db are needed.
        keep_last: as in the forward.
    """
    native, last = state.native(grad.device), _to_last(grad)
    space = triple(x_shape[2:], 1)
    dx = dw = None
    if needs[0] or needs[1]:
        codes = state.encode_grad(last)  # Qg(dy)
    if needs[0]:  # dx = Qg(dy) Qw(w), patches added where they overlap
        dx = conv_input_grad(codes.to_input, kernel, geometry, space, native=native, dtype=x_dtype, keep_last=keep_last)
        dx = images(state.store(dx, "input_grad"), x_shape[2:], last=keep_last)
    if needs[1] and saved is not None:  # dw = mean_n Qg_n(dy)^T Qa(x), over the patches of x
        x = state.restore_input(saved, (x_shape[0], *space, x_shape[1]))
        samples = codes.to_weight
        parts = [
            conv_weight_grad(s, x, geometry, native=native, factor=1 / len(samples), dtype=w_dtype) for s in samples
        ]
        dw = state.store(functools.reduce(Tensor.add_, parts), "weight_grad")
        dw = images(dw if keep_last else dw.transpose(1, 2).contiguous(), weight_shape[2:], last=keep_last)
    db = last.flatten(0, 3).sum(0, dtype=torch.float32).to(w_dtype) if needs[2] else None
    return dx, dw, db


class ConvFunction(torch.autograd.Function):
    """Records the quantised convolution in eager mode."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: LayerState, geometry: Geometry, train: bool
    ) -> Tensor:
        """See :func:`conv_forward_last`; ``train`` is whether gradients are being recorded."""
        save = train and weight.requires_grad
        ctx.keep_last = channels_last_result(x, weight, bias, geometry)
        y, saved, ctx.codes = conv_forward_last(x, weight, bias, state, geometry, save=save, keep_last=ctx.keep_last)
        ctx.state, ctx.geometry, ctx.rest = state, geometry, (x.shape, weight.shape, x.dtype, weight.dtype)
        ctx.save_for_backward(*(saved or ()))
        return _owned(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See :func:`conv_backward_last`."""
        _refuse_double_backward(ctx.state)
        tensors = ctx.saved_tensors  # read once: activation checkpointing recomputes on every read
        saved = SavedInput(*tensors) if tensors else None
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        with _no_autocast(grad):
            x_shape, w_shape, x_dtype, w_dtype = ctx.rest
            grads = conv_backward_last(
                grad,
                saved,
                ctx.codes,
                ctx.state,
                ctx.geometry,
                x_shape,
                w_shape,
                x_dtype,
                w_dtype,
                needs,
                keep_last=ctx.keep_last,
            )
        return *grads, None, None, None


def quantized_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: LayerState, geometry: Geometry) -> Tensor:
    """Return the quantised convolution of a batched ``x`` (N, C, *space); zero padding only."""
    if torch.compiler.is_compiling():
        numbers = [*geometry.kernel, *geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups]
        y: Tensor = torch.ops.lightning_eff.conv(
            x,
            weight,
            bias,
            state.handle,
            numbers,
            channels_last_result(x, weight, bias, geometry),
            _result_dtype(x),
            state.format.nibbles,
            state.format.saved_scales(None),
        )[0]
        return y
    result: Tensor = ConvFunction.apply(x, weight, bias, state, geometry, torch.is_grad_enabled())
    return result
