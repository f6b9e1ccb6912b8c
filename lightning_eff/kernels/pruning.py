"""Unbiased stochastic pruning by the compiled kernel; the same numbers from ``functional`` elsewhere.

Float32 and bfloat16 on the CPU take the compiled path, one pass that also counts the zeros. Everything else takes
``functional``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lightning_eff.functional import lognormal as plain
from lightning_eff.functional.random import draw_seed
from lightning_eff.kernels.build import library

_TYPES = {torch.float32: 0, torch.bfloat16: 1}


def stochastic_prune(x: Tensor, threshold: float | Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """Prune as :func:`lightning_eff.functional.lognormal.stochastic_prune` does.

    Args:
        x: any floating tensor.
        threshold: tau, a number or a 0-d tensor.
        seed: 64-bit seed; default: one draw from torch's global generator.

    Returns:
        The pruned tensor (contiguous), and its number of zeros, a 0-d int64 tensor on the device of ``x``.
    """
    kernels = library() if x.device.type == "cpu" and x.dtype in _TYPES else None
    if kernels is None:
        pruned = plain.stochastic_prune(x, threshold, seed)
        return pruned, (pruned == 0).sum()
    x = x.detach().contiguous()
    tau = float(torch.as_tensor(threshold).to(x.dtype))  # as the values it is compared with
    out, zeros = torch.empty_like(x), torch.empty((), dtype=torch.int64)
    kernels.eff_prune(
        x.data_ptr(),
        _TYPES[x.dtype],
        x.numel(),
        ctypes.c_float(tau),
        (draw_seed() if seed is None else seed) & ((1 << 64) - 1),
        out.data_ptr(),
        zeros.data_ptr(),
        torch.get_num_threads(),
    )
    return out, zeros
