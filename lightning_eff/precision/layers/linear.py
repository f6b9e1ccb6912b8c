"""Quantised twins of torch's linear and convolution layers; see :mod:`lightning_eff.precision.layers.twins`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import handle_torch_function, has_torch_function_unary

from lightning_eff.kernels.geometry import Geometry, shared_geometry
from lightning_eff.precision.layers.autograd import quantized_conv, quantized_linear, triple
from lightning_eff.precision.layers.state import LayerState
from lightning_eff.precision.layers.twins import Twin, active_state, run_plain, takes


class _StraightThrough(torch.autograd.Function):
    """Gives the INT4 values of a weight forward, the gradient unchanged backward."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, state: LayerState) -> Tensor:
        return state.encode_weight(weight).forward.dequantize(weight.dtype)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def int4_weight(weight: Tensor, state: LayerState) -> Tensor:
    """Return ``weight`` on its INT4 levels, differentiable straight through: the fine-tuning phase of LUQ."""
    result: Tensor = _StraightThrough.apply(weight, state)
    return result


def apply_linear(x: Tensor, weight: Tensor, bias: Tensor | None, state: LayerState) -> Tensor:
    """Apply a linear map in the phase ``state`` is in."""
    if state.weights_only:
        return F.linear(x, int4_weight(weight, state), bias)
    return quantized_linear(x, weight, bias, state)


def over_nested(run: Callable[[Tensor], Tensor], x: Any) -> Tensor:
    """Apply a linear map (rows, I) -> (rows, O) to the rows of a nested tensor."""
    if x.layout is torch.jagged:
        values = run(x.values())
        return torch.nested.nested_tensor_from_jagged(values, offsets=x.offsets(), lengths=x.lengths())
    parts = x.unbind()
    rows = run(torch.cat([part.flatten(0, -2) for part in parts])).split([part.shape[:-1].numel() for part in parts])
    return torch.nested.as_nested_tensor([y.view(*p.shape[:-1], -1) for y, p in zip(rows, parts, strict=True)])


class LinearTwin(Twin):
    """Runs :class:`torch.nn.Linear` with quantised products."""

    if TYPE_CHECKING:
        weight: Tensor
        bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        if torch.jit.is_scripting():
            return F.linear(input, self.weight, self.bias)
        return _linear(self, input, self.weight, self.bias)


class HFConv1DTwin(Twin):
    """Runs Hugging Face's ``Conv1D``, a linear map whose weight is stored (I, O), with quantised products."""

    if TYPE_CHECKING:
        weight: Tensor
        bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        if torch.jit.is_scripting():
            return F.linear(x, self.weight.t(), self.bias)
        return _linear(self, x, self.weight.t(), self.bias)


def _linear(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    state = active_state(module, x)
    if state is None:
        return run_plain(module, x)
    if x.is_nested and x.size(-1) == weight.shape[1] and getattr(x, "_ragged_idx", 1) == 1:
        return over_nested(lambda rows: _linear(module, rows, weight, bias), x)
    if has_torch_function_unary(x):
        return handle_torch_function(_linear, (x,), module, x, weight, bias)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1] or not takes(state, x, weight, bias):
        return run_plain(module, x)
    return apply_linear(x, weight, bias, state)


# ----------------------------------------------------------------------------------------------------- convolution


def _symmetric_padding(module: _ConvNd) -> tuple[int, ...] | None:
    """Return the zero padding per axis, or None where torch pads the two sides differently or not with zeros."""
    if module.padding_mode != "zeros":
        return None
    if not isinstance(module.padding, str):
        return tuple(int(p) for p in module.padding)
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return tuple(t // 2 for t in total) if all(t % 2 == 0 for t in total) else None


class ConvTwin(Twin, _ConvNd):
    """Runs :class:`torch.nn.Conv1d`, ``Conv2d`` or ``Conv3d`` with quantised products."""

    CALLED = (*Twin.CALLED, "_conv_forward")

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, C, *space) or (C, *space) to (N, O, *space') or (O, *space')."""
        if torch.jit.is_scripting():
            return self._conv_forward(input, self.weight, self.bias)
        return _convolve(self, input)


def _convolve(module: _ConvNd, x: Tensor) -> Tensor:
    state = active_state(module, x)
    if state is not None and has_torch_function_unary(x):
        return handle_torch_function(_convolve, (x,), module, x)
    if state is None or not takes(state, x, module.weight, module.bias) or not _fits(module, x):
        return run_plain(module, x)
    if state.weights_only:
        return module._conv_forward(x, int4_weight(module.weight, state), module.bias)
    if x.dim() == len(module.kernel_size) + 1:
        return _convolve(module, x.unsqueeze(0)).squeeze(0)
    padding = _symmetric_padding(module)
    if padding is None:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0,) * len(module.kernel_size)
    return quantized_conv(x, module.weight, module.bias, state, _geometry(module, padding))


def _geometry(module: _ConvNd, padding: tuple[int, ...]) -> Geometry:
    make = Geometry if torch.compiler.is_compiling() else shared_geometry
    kernel, stride, dilation = (triple(v, 1) for v in (module.kernel_size, module.stride, module.dilation))
    return make(kernel, stride, triple(padding, 0), dilation, module.groups)


def _fits(module: _ConvNd, x: Tensor) -> bool:
    """Return whether torch takes an input of this shape; what it does not take, it refuses in its own words."""
    dims = len(module.kernel_size)
    if x.dim() not in (dims + 1, dims + 2) or x.shape[-1 - dims] != module.in_channels:
        return False
    spans = zip(x.shape[-dims:], _total_padding(module), module.kernel_size, module.dilation, strict=True)
    return all(n + added > d * (k - 1) for n, added, k, d in spans)


def _total_padding(module: _ConvNd) -> list[int]:
    """Return the elements added along each axis, both sides together."""
    symmetric = _symmetric_padding(module)
    if symmetric is not None:
        return [2 * p for p in symmetric]
    both = module._reversed_padding_repeated_twice[::-1]
    return [a + b for a, b in zip(both[::2], both[1::2], strict=True)]
