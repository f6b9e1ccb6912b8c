"""Write-back of updated bfloat16 weights in one pass; the same bits from ``functional`` elsewhere.

Float32 values go in, a bfloat16 weight is overwritten in place (its version counter moves, as after any in-place
operation). CPU tensors take the compiled path, other devices and builds that of ``functional``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_eff.functional import bf16 as functional
from lightning_eff.kernels.build import library


def _library_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """The kernels, when every tensor is a contiguous one of the CPU."""
    return library() if all(x.device.type == "cpu" and x.is_contiguous() for x in tensors) else None


def write_stochastic(weight: Tensor, value: Tensor, seed: int) -> None:
    """Overwrite ``weight`` with :func:`lightning_eff.functional.bf16.bf16_stochastic_round` of ``value``.

    Args:
        weight: bfloat16.
        value: float32, shape of ``weight``.
        seed: see there.
    """
    weight, value = weight.detach(), value.detach()
    kernels = _library_for(weight, value)
    if kernels is None:
        weight.copy_(functional.bf16_stochastic_round(value, seed))
        return
    threads = torch.get_num_threads()
    kernels.eff_bf16_stochastic(value.data_ptr(), value.numel(), seed, weight.data_ptr(), threads)
    increment_version(weight)


def write_kahan(weight: Tensor, compensation: Tensor, update: Tensor) -> None:
    """Overwrite ``weight`` and ``compensation`` with what :func:`lightning_eff.functional.bf16.kahan_step` returns.

    Args:
        weight: bfloat16.
        compensation: bfloat16, shape of ``weight``.
        update: float32, shape of ``weight``.
    """
    weight, update = weight.detach(), update.detach()
    kernels = _library_for(weight, compensation, update)
    if kernels is None:
        new, rest = functional.kahan_step(weight, compensation, update)
        weight.copy_(new)
        compensation.copy_(rest)
        return
    threads = torch.get_num_threads()
    pointers = (weight.data_ptr(), compensation.data_ptr(), update.data_ptr())
    kernels.eff_bf16_kahan(*pointers, weight.numel(), threads)
    increment_version(weight)


def write_split(weight: Tensor, lo: Tensor, value: Tensor) -> None:
    """Overwrite ``weight`` and ``lo`` with the halves of :func:`lightning_eff.functional.bf16.split_fp32`.

    Args:
        weight: bfloat16.
        lo: int16, shape of ``weight``.
        value: float32, shape of ``weight``.
    """
    weight, value = weight.detach(), value.detach()
    kernels = _library_for(weight, lo, value)
    if kernels is None:
        upper, lower = functional.split_fp32(value)
        weight.copy_(upper)
        lo.copy_(lower)
        return
    threads = torch.get_num_threads()
    kernels.eff_bf16_split(value.data_ptr(), value.numel(), weight.data_ptr(), lo.data_ptr(), threads)
    increment_version(weight)


def join_fp32(hi: Tensor, lo: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See :func:`lightning_eff.functional.bf16.join_fp32`; ``out`` is a float32 tensor to use."""
    hi = hi.detach()
    out = torch.empty(hi.shape, dtype=torch.float32, device=hi.device) if out is None else out
    kernels = _library_for(hi, lo, out)
    if kernels is None:
        return out.copy_(functional.join_fp32(hi, lo))
    kernels.eff_bf16_join(hi.data_ptr(), lo.data_ptr(), hi.numel(), out.data_ptr(), torch.get_num_threads())
    return out
