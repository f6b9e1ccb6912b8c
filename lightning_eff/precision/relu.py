"""``nn.ReLU`` that keeps a bit per element for backward; numerically the same module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_eff.kernels.relu import apply_mask, packs, relu_mask


class _Masked(torch.autograd.Function):
    """``grad`` where a mask lets it pass: linear in ``grad``, so its own gradient is itself."""

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
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, mask = relu_mask(x)
        ctx.save_for_backward(mask)
        ctx.strides = x.stride()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return _Masked.apply(grad, mask, ctx.strides)


class PackedReLU(nn.ReLU):
    """:class:`torch.nn.ReLU`, bit for bit, with 1/32 of the memory kept for backward.

    ``inplace=True`` is not done in place: the input is usually not kept by anyone, the mask is all that is.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Same shape, dtype and strides as the input."""
        recording = torch.is_grad_enabled() and x.requires_grad
        if torch.compiler.is_compiling() or not recording or not packs(x):
            return super().forward(x)
        y: Tensor = _PackedReLU.apply(x)
        return y
