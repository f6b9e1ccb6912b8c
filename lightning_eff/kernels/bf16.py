"""Write-back of updated bfloat16 weights in one pass; the same bits from ``functional`` elsewhere.

Float32 values go in, a bfloat16 weight is overwritten in place (its version counter moves, as after any in-place
operation). CPU tensors take the compiled path, other devices and builds that of ``functional``. For SGD there is also
the whole step in one pass, :func:`sgd_step`.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_eff.functional.numerics import bf16 as functional
from lightning_eff.functional.random import MASK64
from lightning_eff.kernels.operands import CPU, kernels_for, pointer, threads, wrote

_HALF, _WHOLE, _LOWER = torch.bfloat16, torch.float32, torch.int16


def _kernels_for(*tensors: Tensor | None) -> ctypes.CDLL | None:
    """The kernels, when every tensor is a contiguous one of the CPU."""
    return kernels_for(*tensors) if all(x is None or x.is_contiguous() for x in tensors) else None


def write_stochastic(weight: Tensor, value: Tensor, seed: int) -> None:
    """Overwrite ``weight`` with :func:`lightning_eff.functional.bf16_stochastic_round` of ``value``.

    Args:
        weight: bfloat16.
        value: float32, shape of ``weight``.
        seed: see there.
    """
    weight, value = weight.detach(), value.detach()
    kernels = _kernels_for(weight, value)
    if kernels is None:
        weight.copy_(functional.bf16_stochastic_round(value, seed))
        return
    n = weight.numel()
    kernels.eff_bf16_stochastic(
        pointer("eff_bf16_stochastic(x)", value, n, _WHOLE),
        n,
        seed & MASK64,
        pointer("eff_bf16_stochastic(out)", weight, n, _HALF),
        threads(),
    )
    wrote(weight)


def write_kahan(weight: Tensor, compensation: Tensor, update: Tensor, *, is_sum: bool = False) -> None:
    """Overwrite ``weight`` and ``compensation`` with what :func:`lightning_eff.functional.kahan_step` returns.

    Args:
        weight: bfloat16.
        compensation: bfloat16, shape of ``weight``.
        update: float32, shape of ``weight``.
        is_sum: ``update`` is the updated weight instead: ``update - weight`` is what is added.
    """
    weight, update = weight.detach(), update.detach()
    kernels = _kernels_for(weight, compensation, update)
    if kernels is None:
        new, rest = functional.kahan_step(weight, compensation, update - weight if is_sum else update)
        weight.copy_(new)
        compensation.copy_(rest)
        return
    n = weight.numel()
    kernels.eff_bf16_kahan(
        pointer("eff_bf16_kahan(weight)", weight, n, _HALF),
        pointer("eff_bf16_kahan(compensation)", compensation, n, _HALF),
        pointer("eff_bf16_kahan(x)", update, n, _WHOLE),
        n,
        is_sum,
        threads(),
    )
    wrote(weight)


def write_split(weight: Tensor, lo: Tensor, value: Tensor) -> None:
    """Overwrite ``weight`` and ``lo`` with the halves of :func:`lightning_eff.functional.split_fp32`.

    Args:
        weight: bfloat16.
        lo: int16, shape of ``weight``.
        value: float32, shape of ``weight``.
    """
    weight, value = weight.detach(), value.detach()
    kernels = _kernels_for(weight, lo, value)
    if kernels is None:
        upper, lower = functional.split_fp32(value)
        weight.copy_(upper)
        lo.copy_(lower)
        return
    n = weight.numel()
    kernels.eff_bf16_split(
        pointer("eff_bf16_split(x)", value, n, _WHOLE),
        n,
        pointer("eff_bf16_split(hi)", weight, n, _HALF),
        pointer("eff_bf16_split(lo)", lo, n, _LOWER),
        threads(),
    )
    wrote(weight)


def join_fp32(hi: Tensor, lo: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See :func:`lightning_eff.functional.join_fp32`; ``out`` is a float32 tensor to use."""
    hi = hi.detach()
    out = torch.empty(hi.shape, dtype=torch.float32, device=hi.device) if out is None else out
    kernels = _kernels_for(hi, lo, out)
    if kernels is None:
        return out.copy_(functional.join_fp32(hi, lo))
    n = hi.numel()
    kernels.eff_bf16_join(
        pointer("eff_bf16_join(hi)", hi, n, _HALF),
        pointer("eff_bf16_join(lo)", lo, n, _LOWER),
        n,
        pointer("eff_bf16_join(out)", out, n, _WHOLE),
        threads(),
    )
    return out


@dataclass(frozen=True)
class SGDRule:
    """The numbers of a step of ``torch.optim.SGD``, by the names of its parameter groups."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    def __call__(self, value: Tensor, grad: Tensor, buffer: Tensor | None, *, first: bool) -> None:
        """Update float32 ``value`` and ``buffer`` in place by the operations that torch's own SGD runs."""
        grad = -grad if self.maximize else grad
        grad = grad.add(value, alpha=self.weight_decay) if self.weight_decay else grad
        if buffer is not None:
            _ = buffer.copy_(grad) if first else buffer.mul_(self.momentum).add_(grad, alpha=1 - self.dampening)
            grad = grad.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        value.add_(grad, alpha=-self.lr)


def sgd_step(
    rule: SGDRule,
    weight: Tensor,
    kept: Tensor | None,
    grad: Tensor,
    buffer: Tensor | None,
    *,
    update: Literal["sr", "kahan", "split"],
    first: bool = False,
    seed: int = 0,
) -> bool:
    """Widen ``weight``, step as ``torch.optim.SGD`` and write back, all in one pass; return whether it was done.

    The bits are those of the four steps done one by one. They are not done where there is no compiled kernel, where a
    tensor is not contiguous or not the CPU's, where the momentum is not float32, or where torch's additions turn out to
    round differently.

    Args:
        rule: learning rate and the like.
        weight: bfloat16, overwritten.
        kept: compensation (``"kahan"``, bfloat16) or lower half (``"split"``, int16), overwritten.
        grad: bfloat16.
        buffer: float32 momentum, overwritten; None without momentum.
        update: how the weight is written back.
        first: ``buffer`` holds nothing yet.
        seed: of the stochastic rounding.
    """
    weight, grad = weight.detach(), grad.detach()
    kernels = _kernels_for(weight, kept, grad, buffer)
    fits = buffer is None or (buffer.dtype is torch.float32 and buffer.shape == weight.shape)
    if kernels is None or not fits or not rounds_like_torch(kernels):
        return False
    _sgd(kernels, rule, weight, kept, grad, buffer, update=update, first=first, seed=seed)
    wrote(weight)
    return True


def _sgd(
    kernels: ctypes.CDLL,
    rule: SGDRule,
    weight: Tensor,
    kept: Tensor | None,
    grad: Tensor,
    buffer: Tensor | None,
    *,
    update: str,
    first: bool,
    seed: int,
) -> None:
    n = weight.numel()
    kernels.eff_bf16_sgd(
        pointer("eff_bf16_sgd(weight)", weight, n, _HALF),
        pointer("eff_bf16_sgd(kept)", kept, n, {"kahan": _HALF, "split": _LOWER}.get(update, _HALF)),
        pointer("eff_bf16_sgd(grad)", grad, n, _HALF),
        pointer("eff_bf16_sgd(buffer)", buffer, n, _WHOLE),
        n,
        ("sr", "kahan", "split").index(update),
        seed & MASK64,
        rule.weight_decay,
        0.0 if buffer is None else rule.momentum,
        1 - rule.dampening,
        -rule.lr,
        first,
        rule.nesterov,
        rule.maximize,
        threads(),
    )


@functools.cache
def rounds_like_torch(kernels: ctypes.CDLL) -> bool:
    """Return whether the kernel's fused multiply-adds are what torch's ``add`` with ``alpha`` does on this machine."""
    rule = SGDRule(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01, nesterov=True, maximize=True)
    generator = torch.Generator().manual_seed(0)  # vectors, and a rest
    value, grad, buffer = torch.randn(3, 1003, generator=generator, dtype=torch.float32, device=CPU)
    weight, half = value.to(torch.bfloat16), grad.to(torch.bfloat16)
    lo, ours, theirs = torch.zeros_like(weight, dtype=torch.int16), buffer.clone(), weight.to(torch.float32)
    _sgd(kernels, rule, weight, lo, half, ours, update="split", first=False, seed=0)
    rule(theirs, half.to(torch.float32), buffer, first=False)
    return torch.equal(functional.join_fp32(weight, lo), theirs) and torch.equal(ours, buffer)
