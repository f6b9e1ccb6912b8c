"""``nn.ReLU`` that keeps a bit per element for backward; numerically the same module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.kernels.relu import apply_mask, packs, relu_mask
from lightning_eff.precision.layers.twins import Twin, run_plain, unquantised


class _Masked(torch.autograd.Function):
    """Passes ``grad`` where a mask lets it: linear in ``grad``, so its own gradient is itself."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, mask: Tensor, strides: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.strides = strides
        return apply_mask(grad, mask, strides)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return _Masked.apply(grad, mask, ctx.strides), None, None


class _PackedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        y, mask = relu_mask(x, inplace=inplace)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(mask)
        ctx.strides = x.stride()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return _Masked.apply(grad, mask, ctx.strides), None


class ReLUTwin(Twin):
    """Runs :class:`torch.nn.ReLU`, bit for bit and in place if it is, with 1/32 of the memory kept for backward."""

    inplace: bool

    def forward(self, input: Tensor) -> Tensor:
        """Return the ReLU in the shape, dtype and strides of the input."""
        if torch.jit.is_scripting():
            return F.relu(input, inplace=self.inplace)
        if not _packs_now(input):
            return run_plain(self, input)
        y: Tensor = _PackedReLU.apply(input, self.inplace)
        return y


def _packs_now(x: Tensor) -> bool:
    """Return whether gradients are recorded, and the tensor is one whose memory can be written bit by bit."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in (Tensor, nn.Parameter):
        return False
    return torch.is_grad_enabled() and x.requires_grad and not unquantised(x, x) and packs(x)
