"""Products of integer codes: exact int8 GEMMs with int32 accumulation, or the same sums without int8 units.

INT4 codes (-7..7 or 0..15) and FP4 codes in units of alpha (0, ±1 .. ±64) are exact in int8, so all three products of
a training step run on the int8 units of the machine through ``torch._int_mm``. Where there are none the codes are
widened, and the sums are the same integers:

    codes              multiplied as                                  one sum is exact up to
    int8               float32                                        1024 terms
    int16, CPU         float64                                        2^23 terms
    int16, elsewhere   four products of their halves, in float32      1024 terms
    values             bfloat16, or float64 on the CPU (float32
                       elsewhere) where sums are to stay float32

:func:`sum_of_products` is the one place where sums are made. It cuts what is longer and adds up in float64, whatever
the codes are and whoever calls: no sum overflows, none is rounded by the type it is made in.

None of this follows ``torch.set_float32_matmul_precision``, ``allow_tf32`` or autocast, which may make bfloat16 or TF32
of float32 operands. Codes of eight bits, and halves of sixteen (-128..128), are exact in all of these (bfloat16 holds
the integers up to 256), float64 is none of them, and autocast is switched off around a product. Changing the global
setting around each product instead would race with the user's threads. Values fit bfloat16, too, but float32 sums of
them would be added up in another order under another setting: hence float64.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_eff.functional.codes import Codes
from lightning_eff.kernels.fp8 import fp8_product
from lightning_eff.kernels.int16 import halves, int16_product
from lightning_eff.kernels.operands import FP8_FORMATS, TYPES, empty, kernels_for, pointer, threads, without_autocast

INT8_TERM = 128 * 128
"""Largest magnitude of a product of two int8 codes."""
INT32_TERMS = (2**31 - 1) // INT8_TERM
FLOAT32_TERMS = 2**24 // INT8_TERM
_OTHER_TERMS = 1 << 20
"""Terms of sums that are float64 or are rounded anyway: those of int16 units and of values that are no integers."""

_SUM_TYPES = {torch.float32: 0, torch.int32: 1, torch.bfloat16: 2}


class _Scratch(threading.local):
    """Grow-only buffers reused by every layer: fresh large temporaries cost more in page faults than the arithmetic."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < numel:
            with torch.inference_mode(False):  # a buffer made in validation must serve training too
                buffer = self.buffers[name, dtype] = empty((numel,), dtype)
        return buffer[:numel]


scratch = _Scratch()


def _row_major(x: Tensor) -> Tensor:
    """Give a single row its true strides: on the CPU ``torch._int_mm`` misreads the (1, 1) of ``column.t()``."""
    return x.as_strided(x.shape, (x.shape[1], 1)) if x.shape[0] == 1 and x.stride(1) == 1 else x


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """int8 (M, K) x int8 (K, N) -> int32 (M, N); CUDA's shape rules are met by padding with zeros."""
    if a.device.type != "cuda":
        out = scratch("product", a.shape[0] * b.shape[1], torch.int32).view(a.shape[0], b.shape[1])
        return torch._int_mm(_row_major(a), _row_major(b), out=out)
    return torch._int_mm(*padded(a, b))[: a.shape[0], : b.shape[1]]


def padded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Add zeros to the operands until CUDA's rules hold: more than 16 rows, inner and outer size multiples of 8."""
    (m, k), n = a.shape, b.shape[1]
    a = torch.nn.functional.pad(a, (0, -k % 8, 0, max(17 - m, 0)))
    return a.contiguous(), torch.nn.functional.pad(b, (0, -n % 8, 0, -k % 8))


def _widened(name: str, codes: Tensor, dtype: torch.dtype) -> Tensor:
    if not codes.is_cpu:
        return codes.to(dtype)
    wide = scratch(name, codes.numel(), dtype)
    if codes.stride(1) == 1:
        return wide.view(codes.shape).copy_(codes)
    return wide.view(codes.shape[::-1]).copy_(codes.t()).t()


def code_product(a: Tensor, b: Tensor, *, native: bool) -> Tensor:
    """Multiply codes, exactly for integers (int16 units round in float32, see :mod:`lightning_eff.kernels.int16`).

    Args:
        a: (M, K) int8, int16 (shared-exponent integers, or codes beyond int8), or values that bfloat16 holds: sums of
            bfloat16 are rounded to bfloat16, but not where one of the operands is float32.
        b: (K, N) likewise.
        native: use the int8 or int16 units.

    Returns:
        (M, N): int32, float32 or float64 holding integers, or values. Perhaps a buffer that the next call overwrites.
    """
    total = sum_of_products([(a, b)], native=native)
    return torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device) if total is None else total


def sum_of_products(pairs: Iterable[tuple[Tensor, Tensor]], *, native: bool) -> Tensor | None:
    """Return the sum of :func:`code_product` over pairs of equal outer sizes; None if there is nothing to sum.

    A pair is used up before the next is asked for, so that all may lie in one buffer.
    """
    total: Tensor | None = None
    terms, borrowed = 0, False
    for a, b in pairs:
        limit = _longest_sum(a, b, native)
        for left, right in _cut(a, b, limit):
            terms += left.shape[1]
            if total is not None:
                if (terms > limit or a.is_floating_point()) and total.dtype != _wide(a):
                    total = total.to(_wide(a))
                elif borrowed:
                    total = total.clone()
                borrowed = False
            part, overwritten = single_product(left, right, native)
            if total is None:
                total, borrowed = part, overwritten
            else:
                total.add_(part)
    return total


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no other


def _longest_sum(a: Tensor, b: Tensor, native: bool) -> int:
    """How many terms one product may add up: the integers of any codes fit the type of its sums."""
    small = a.dtype == b.dtype == torch.int8
    if a.is_floating_point() or (native and a.dtype == b.dtype == torch.int16) or (a.is_cpu and not small):
        return _OTHER_TERMS
    return INT32_TERMS if native and small else FLOAT32_TERMS


def _cut(a: Tensor, b: Tensor, limit: int) -> Iterable[tuple[Tensor, Tensor]]:
    if a.numel() == 0 or b.numel() == 0:
        return []
    if a.shape[1] <= limit:
        return [(a, b)]
    return zip(a.split(limit, 1), b.split(limit, 0), strict=True)


def single_product(a: Tensor, b: Tensor, native: bool) -> tuple[Tensor, bool]:
    """Return ``a @ b``, of few enough terms, and whether it lies in a buffer that the next product overwrites."""
    small = a.dtype == b.dtype == torch.int8
    if native and small:
        return _int_mm(a, b), True
    if native and a.dtype == b.dtype == torch.int16:
        return int16_product(a, b), False
    with without_autocast(a):
        if a.is_floating_point() and a.dtype == b.dtype:
            return torch.mm(a, b), False
        if a.is_cpu or small or a.is_floating_point():
            dtype = torch.float64 if a.is_cpu and not small else torch.float32
            return torch.mm(_widened("left", a, dtype), _widened("right", b, dtype)), False
        parts = [torch.mm(x, y).to(_wide(a)).mul_(p * q) for p, x in halves(a) for q, y in halves(b)]
    return functools.reduce(Tensor.add_, parts), False


def rescale(
    acc: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    factor: float = 1.0,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``acc * (a * b * factor) + bias`` in one pass; ``acc * (a * factor) * b + bias`` if a or b is a vector.

    Args:
        acc: (M, N) int32, float32, float64 or bfloat16 sums.
        a: float32 scale of the left codes, 0-d or (M, 1).
        b: float32 scale of the right codes, 0-d or (1, N).
        factor: constant, 1/N of SMP-N for instance.
        bias: (N,) or ``None``.
        dtype: of the result; float32 and bfloat16 have a kernel.
        out: contiguous (M, N) tensor of ``dtype`` to write to.
    """
    one_scale = a.dim() == b.dim() == 0
    kernels = kernels_for(acc, a, b, out) if dtype in TYPES else None
    if kernels is None:
        result = acc.to(torch.float32) * (a * b * factor) if one_scale else acc.to(torch.float32) * (a * factor) * b
        result = result if bias is None else result + bias.to(torch.float32)
        return result.to(dtype) if out is None else out.copy_(result)
    acc = (acc.to(torch.float32) if acc.dtype == torch.float64 else acc).contiguous()
    (rows, columns), n = acc.shape, acc.numel()
    out = empty((rows, columns), dtype) if out is None else out
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    if one_scale:
        kernels.eff_scale(
            pointer("eff_scale(acc)", acc, n, *_SUM_TYPES),
            _SUM_TYPES[acc.dtype],
            rows,
            columns,
            pointer("eff_scale(scale_a)", a, 1, torch.float32),
            pointer("eff_scale(scale_b)", b, 1, torch.float32),
            factor,
            pointer("eff_scale(bias)", bias, columns, torch.float32),
            pointer("eff_scale(out)", out, n, dtype),
            TYPES[dtype],
            columns,
            threads(),
        )
        return out
    a, b = a.expand(rows, 1).contiguous(), b.expand(1, columns).contiguous()
    kernels.eff_scale_rows(
        pointer("eff_scale_rows(acc)", acc, n, *_SUM_TYPES),
        _SUM_TYPES[acc.dtype],
        rows,
        columns,
        pointer("eff_scale_rows(scale_a)", a, rows, torch.float32),
        pointer("eff_scale_rows(scale_b)", b, columns, torch.float32),
        factor,
        pointer("eff_scale_rows(bias)", bias, columns, torch.float32),
        pointer("eff_scale_rows(out)", out, n, dtype),
        TYPES[dtype],
        threads(),
    )
    return out


def scaled_product(
    a: Codes,
    b: Codes,
    *,
    native: bool,
    factor: float = 1.0,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return ``(a.codes @ b.codes) * (a.scale * b.scale * factor) + bias``; codes (M, K) and (K, N), result (M, N)."""
    if native and a.codes.dtype in FP8_FORMATS and a.codes.numel() and b.codes.numel():
        return fp8_product(a, b, factor=factor, bias=bias, dtype=dtype)
    acc = code_product(a.codes, b.codes, native=native)
    return rescale(acc, a.scale, b.scale, factor=factor, bias=bias, dtype=dtype)
