"""Products of int16 matrices: int32 chains that cannot overflow, added up in float32.

    c_mn = float32 sum over chains of (int32 sum over the chain of a_mk b_kn)

A product of two int16 codes has up to 30 bits, and only two of them fit int32 whatever the codes. The compiled kernel
bounds from the data what longer chains can reach (Cauchy-Schwarz on blocks of four terms, the largest norms of 6 rows
and 32 columns) and makes every chain as long as the bound allows: some 15 terms for normally distributed codes that
fill int16, all 512 of a slice of K for codes below 2048, two for codes at full scale. No int32 sum overflows for any
input, -32768 included. The only rounding is that of float32: of every chain's sum, of the at most ceil(K / 2) additions
of these and of one addition per slice,

    |c - exact| <= (K / 2 + K / 512 + 4) * 2^-24 * sum_k |a_mk b_kn|,

with K / 15 for K / 2 for normally distributed codes, and no error where that sum is at most 2^24. The result is a
function of the codes alone: the same for every number of threads, every layout, with and without AVX512-VNNI.

References:
    Das et al., Mixed Precision Training of Convolutional Neural Networks using Integer Operations, ICLR 2018,
    arXiv:1802.00930. Differs: there the length of the chains is fixed; here it follows from the data.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lightning_eff.errors import ConfigurationError
from lightning_eff.kernels.operands import kernels_for, matrix_pointer, pointer, threads


def int16_native() -> bool:
    """Return whether :func:`int16_product` runs on int16 units of this processor (AVX512-VNNI), faster than float32."""
    kernels, native = kernels_for(), ctypes.c_int32()
    if kernels is not None:
        kernels.eff_int16_native(ctypes.byref(native))
    return bool(native.value)


def int16_product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return ``a @ b`` of integers, in float32.

    On the CPU this is the compiled kernel: with AVX512-VNNI about twice as fast as float32 (1.2 times for uniform codes
    that fill int16 on both sides), slower than float32 on other processors. Elsewhere the product is taken in float64,
    exact up to K = 2^23, and rounded to float32 once: more accurate than the kernel, with other last bits.

    Args:
        a: (M, K) int16. Either dimension may be the contiguous one; anything else is copied first.
        b: (K, N) int16 on the same device, likewise.
        out: contiguous (M, N) float32 tensor to write to, sharing no memory with ``a`` and ``b``; default: a new one.

    Returns:
        (M, N) float32.

    Raises:
        ConfigurationError: dtypes, shapes or devices do not fit.

    Example:
        >>> a = torch.tensor([[32767, 32767, -32768]], dtype=torch.int16)
        >>> int16_product(a, a.t())
        tensor([[3.2211e+09]])
    """
    _check(a, b, out)
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty(m, n, dtype=torch.float32, device=a.device) if out is None else out
    kernels = kernels_for(a, b, out)
    if out.numel() == 0 or k == 0:
        return out.zero_()
    if kernels is None:
        return out.copy_(_emulated(a, b))
    a, b = _dense(a), _dense(b)
    kernels.eff_int16_product(
        matrix_pointer("eff_int16_product(a)", a, torch.int16),
        *a.stride(),
        matrix_pointer("eff_int16_product(b)", b, torch.int16),
        *b.stride(),
        m,
        n,
        k,
        pointer("eff_int16_product(out)", out, m * n, torch.float32),
        threads(),
    )
    return out


def _check(a: Tensor, b: Tensor, out: Tensor | None) -> None:
    if not (a.dtype == b.dtype == torch.int16 and a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0]):
        raise ConfigurationError(
            f"int16_product takes (M, K) and (K, N) int16, "
            f"not {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
        )
    if a.device != b.device:
        raise ConfigurationError(f"int16_product takes operands on one device, not on {a.device} and {b.device}")
    if out is None:
        return
    shape = (a.shape[0], b.shape[1])
    if out.shape != shape or out.dtype != torch.float32 or out.device != a.device or not out.is_contiguous():
        raise ConfigurationError(
            f"out must be a contiguous {shape} float32 tensor on {a.device}, not {tuple(out.shape)} {out.dtype} "
            f"on {out.device} with strides {out.stride()}"
        )


def _dense(x: Tensor) -> Tensor:
    return x if 1 in x.stride() else x.contiguous()


def halves(codes: Tensor) -> list[tuple[float, Tensor]]:
    """Return ``codes`` as a sum of (factor, tensor): of int16, float32 integers in -128..128; of others, the codes.

    Integers up to 256 fit bfloat16 and TF32, whichever a product makes of its float32 operands.
    """
    if codes.dtype != torch.int16:
        return [(1.0, codes if codes.is_floating_point() else codes.to(torch.float32))]
    upper = codes.to(torch.float32).mul_(1 / 256).round_()
    return [(256.0, upper), (1.0, torch.sub(codes, upper, alpha=256))]


def _emulated(a: Tensor, b: Tensor) -> Tensor:
    """The product in float64, which neither TF32 nor autocast touch; in float32 where there is none (MPS)."""
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    return torch.mm(a.to(wide), b.to(wide))
