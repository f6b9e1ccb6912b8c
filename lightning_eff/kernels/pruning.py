"""Unbiased stochastic pruning by the compiled kernel; the same numbers from ``functional`` elsewhere.

Float32 and bfloat16 on the CPU take the compiled path, one pass that also counts the zeros. Everything else takes
``functional``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lightning_eff.functional.numerics import lognormal as plain
from lightning_eff.functional.random import MASK64, draw_seed
from lightning_eff.kernels.operands import (
    CPU,
    FLOATS,
    TYPES,
    empty,
    kernels_for,
    pointer,
    prepared,
    threads,
)


def stochastic_prune(x: Tensor, threshold: float | Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """Prune as :func:`lightning_eff.functional.stochastic_prune` does.

    Args:
        x: any floating tensor.
        threshold: tau, a number or a 0-d tensor.
        seed: 64-bit seed; default: one draw from torch's global generator.

    Returns:
        The pruned tensor (contiguous), and its number of zeros, a 0-d int64 tensor on the device of ``x``.
    """
    kernels = kernels_for(x) if x.dtype in TYPES else None
    if kernels is None:
        pruned = plain.stochastic_prune(x, threshold, seed)
        return pruned, (pruned == 0).sum()
    x = prepared(x)
    tau = float(plain.threshold_of(threshold, x.dtype, CPU))
    n, out, zeros = x.numel(), torch.empty_like(x), empty((), torch.int64)
    kernels.eff_prune(
        pointer("eff_prune(x)", x, n, *FLOATS),
        TYPES[x.dtype],
        n,
        ctypes.c_float(tau),
        (draw_seed() if seed is None else seed) & MASK64,
        pointer("eff_prune(out)", out, n, x.dtype),
        pointer("eff_prune(zeros)", zeros, 1, torch.int64),
        threads(),
    )
    return out, zeros
