"""Quantised twins of torch's layers, reached by changing a module's class in place.

Parameters, buffers, hooks and ``state_dict`` keys are those of the plain layer; giving the class back makes it plain
again. A twin finds its :class:`~lightning_eff.precision.state.LayerState` in ``module.__dict__``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_eff.errors import UnsupportedLayerError
from lightning_eff.kernels.geometry import Geometry, Triple, shared_geometry
from lightning_eff.precision.functions import quantized_conv, quantized_linear
from lightning_eff.precision.sharded import own_class
from lightning_eff.precision.state import LayerState

STATE = "_eff_state"
"""Name of the attribute that holds a converted layer's state."""


class _StraightThrough(torch.autograd.Function):
    """INT4 values of a weight forward, the gradient unchanged backward."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, state: LayerState) -> Tensor:
        return state.encode_weight(weight).forward.dequantize(weight.dtype)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def int4_weight(weight: Tensor, state: LayerState) -> Tensor:
    """``weight`` on its INT4 levels, differentiable straight through: the fine-tuning phase of LUQ."""
    result: Tensor = _StraightThrough.apply(weight, state)
    return result


def apply_linear(x: Tensor, weight: Tensor, bias: Tensor | None, state: LayerState) -> Tensor:
    """A linear map in the phase ``state`` is in."""
    if state.weights_only:
        return F.linear(x, int4_weight(weight, state), bias)
    return quantized_linear(x, weight, bias, state)


class QuantLinear(nn.Linear):
    """:class:`torch.nn.Linear` with quantised products."""

    _eff_state: LayerState

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return apply_linear(x, self.weight, self.bias, self._eff_state)


class QuantHFConv1D(nn.Module):
    """Hugging Face's ``Conv1D``, a linear map whose weight is stored (I, O), with quantised products."""

    _eff_state: LayerState
    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return apply_linear(x, self.weight.t(), self.bias, self._eff_state)


def _symmetric_padding(module: _ConvNd) -> tuple[int, ...] | None:
    """Zero padding per axis, or None where torch pads the two sides differently or not with zeros."""
    if module.padding_mode != "zeros":
        return None
    if not isinstance(module.padding, str):
        return tuple(int(p) for p in module.padding)
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return tuple(t // 2 for t in total) if all(t % 2 == 0 for t in total) else None


def _triple(values: tuple[int, ...], missing: int) -> Triple:
    z, y, x = (missing,) * (3 - len(values)) + values
    return z, y, x


class _QuantConv(_ConvNd):
    _eff_state: LayerState

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *space) or (C, *space) -> (N, O, *space') or (O, *space')."""
        if self._eff_state.weights_only:
            weight = int4_weight(self.weight, self._eff_state)
            return self._conv_forward(x, weight, self.bias)  # type: ignore[attr-defined,no-any-return]
        dims = len(self.kernel_size)
        if x.dim() == dims + 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if x.dim() != dims + 2:
            raise UnsupportedLayerError(
                f"{self._eff_state.name}: {dims}-d convolution got an input of shape {tuple(x.shape)}; expected "
                f"{dims + 2} dimensions (batch, channels, space) or {dims + 1} without batch."
            )
        padding = _symmetric_padding(self)
        if padding is None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0,) * dims
        make = Geometry if torch.compiler.is_compiling() else shared_geometry
        geometry = make(
            _triple(self.kernel_size, 1),
            _triple(self.stride, 1),
            _triple(padding, 0),
            _triple(self.dilation, 1),
            self.groups,
        )
        return quantized_conv(x, self.weight, self.bias, self._eff_state, geometry)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` with quantised products."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` with quantised products."""


class QuantConv3d(_QuantConv, nn.Conv3d):
    """:class:`torch.nn.Conv3d` with quantised products."""


TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantLinear,
    NonDynamicallyQuantizableLinear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
}
"""Exact layer type -> quantised twin. Subclasses may have a forward of their own and are left alone, and named."""


def twin_of(module: nn.Module) -> type[nn.Module] | None:
    """The quantised twin of ``module``, or None; what ``fully_shard`` made of a layer has the layer's."""
    kind = own_class(type(module))
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return QuantHFConv1D
    if kind is nn.MultiheadAttention:
        from lightning_eff.precision.attention import QuantMultiheadAttention

        return QuantMultiheadAttention
    return TWINS.get(kind)
