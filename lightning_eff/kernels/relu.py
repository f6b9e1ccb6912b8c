"""ReLU that keeps one bit per element for backward instead of its whole output.

In a network of convolutions and ReLUs the tensor a layer saves and the tensor ReLU saves are one; packing the former to
four bits frees nothing while the latter stays. The result and its gradient are torch's, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.errors import InternalError
from lightning_eff.kernels.operands import CPU, FLOATS, TYPES, empty, is_dense, kernels_for, pointer, threads


def packs(x: Tensor) -> bool:
    """Return whether there is a kernel for ``x``: float32 or bfloat16 on the CPU, dense."""
    return x.is_cpu and x.dtype in TYPES and not x.is_neg() and kernels_for(x) is not None and is_dense(x)


def relu_mask(x: Tensor, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """Return ``relu(x)``, strides kept, and a bit per element (uint8, in memory order) where the gradient passes.

    ``inplace`` overwrites ``x``; its version counter is the caller's to move.
    """
    kernels = kernels_for(x)
    if kernels is None:
        raise InternalError("internal error: relu_mask without compiled kernels")
    n, y, mask = x.numel(), x if inplace else torch.empty_like(x), empty(((x.numel() + 7) // 8,), torch.uint8)
    kernels.eff_relu(
        pointer("eff_relu(x)", x, n, *FLOATS, any_order=True),
        TYPES[x.dtype],
        n,
        pointer("eff_relu(y)", y, n, x.dtype, any_order=True),
        pointer("eff_relu(mask)", mask, (n + 7) // 8, torch.uint8),
        threads(),
    )
    return y, mask


def apply_mask(grad: Tensor, mask: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return ``grad`` where the bit is set, else zero; ``strides`` are those of the tensor the mask was made from."""
    kernels = kernels_for(grad, mask)
    if kernels is None:
        raise InternalError("internal error: apply_mask without compiled kernels")
    if grad.stride() != strides or grad.is_neg():
        grad = torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=CPU).copy_(grad)
    n, out = grad.numel(), torch.empty_like(grad)
    kernels.eff_relu_grad(
        pointer("eff_relu_grad(grad)", grad, n, *FLOATS, any_order=True),
        TYPES[grad.dtype],
        pointer("eff_relu_grad(mask)", mask, (n + 7) // 8, torch.uint8),
        n,
        pointer("eff_relu_grad(out)", out, n, grad.dtype, any_order=True),
        threads(),
    )
    return out
