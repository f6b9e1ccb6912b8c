"""ReLU that keeps one bit per element for backward instead of its whole output.

In a network of convolutions and ReLUs the tensor a layer saves and the tensor ReLU saves are one; packing the former to
four bits frees nothing while the latter stays. The result and its gradient are torch's, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.kernels.build import library
from lightning_eff.kernels.quantize import TYPES


def _dense(x: Tensor) -> bool:
    """Whether the elements fill one piece of memory, in any order of axes."""
    strides = x.stride()
    return x.is_contiguous() or x.permute(sorted(range(x.dim()), key=lambda d: -strides[d])).is_contiguous()


def packs(x: Tensor) -> bool:
    """Whether there is a kernel for ``x``: float32 or bfloat16 on the CPU, dense."""
    return x.device.type == "cpu" and x.dtype in TYPES and library() is not None and _dense(x)


def relu_mask(x: Tensor, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``relu(x)``, strides kept, and a bit per element (uint8, in memory order) where the gradient passes.

    ``out`` is ``x`` itself to do it in place; default: a new tensor.
    """
    kernels = library()
    if kernels is None:
        raise RuntimeError("internal error: relu_mask without compiled kernels")
    y = torch.empty_like(x) if out is None else out
    mask = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
    threads = torch.get_num_threads()
    kernels.eff_relu(x.data_ptr(), TYPES[x.dtype], x.numel(), y.data_ptr(), mask.data_ptr(), threads)
    return y, mask


def apply_mask(grad: Tensor, mask: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``grad`` where the bit is set, else zero; ``strides`` are those of the tensor the mask was made from."""
    kernels = library()
    if kernels is None:
        raise RuntimeError("internal error: apply_mask without compiled kernels")
    if grad.stride() != strides:
        grad = torch.empty_strided(grad.shape, strides, dtype=grad.dtype).copy_(grad)
    out, threads = torch.empty_like(grad), torch.get_num_threads()
    kernels.eff_relu_grad(grad.data_ptr(), TYPES[grad.dtype], mask.data_ptr(), grad.numel(), out.data_ptr(), threads)
    return out
