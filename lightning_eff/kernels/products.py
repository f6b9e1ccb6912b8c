"""Products of integer codes: exact int8 GEMMs with int32 accumulation, or the same sums in float32.

INT4 codes (-7..7 or 0..15) and FP4 codes in units of alpha (0, ±1 .. ±64) are exact in int8, so all three products of
a training step run on the int8 units of the machine through ``torch._int_mm``. Where there are none, codes are
widened to float32: the sums are the same integers as long as they stay below 2^24, which :func:`code_product`
guarantees by splitting long sums.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from lightning_eff.functional.formats import Codes
from lightning_eff.kernels.build import library
from lightning_eff.kernels.fp8 import fp8_product
from lightning_eff.kernels.int16 import int16_product
from lightning_eff.kernels.quantize import TYPES

LARGEST_TERM = 15 * 128
"""Largest magnitude of one term: an unsigned INT4 code times the top FP4 code of ``levels=8``."""
_INT32_TERMS = 2**31 // LARGEST_TERM
_FLOAT32_TERMS = 2**24 // LARGEST_TERM


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SUM_TYPES = {torch.float32: 0, torch.int32: 1, torch.bfloat16: 2}


class _Scratch(threading.local):
    """Grow-only buffers reused by every layer: fresh large temporaries cost more in page faults than the arithmetic."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < numel:
            with torch.inference_mode(False):  # a buffer made in validation must serve training too
                buffer = self.buffers[name, dtype] = torch.empty(numel, dtype=dtype)
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
    """Operands with zeros added until CUDA's rules hold: more than 16 rows, inner and outer size multiples of 8."""
    (m, k), n = a.shape, b.shape[1]
    a = torch.nn.functional.pad(a, (0, -k % 8, 0, max(17 - m, 0)))
    return a.contiguous(), torch.nn.functional.pad(b, (0, -n % 8, 0, -k % 8))


def _widened(name: str, codes: Tensor) -> Tensor:
    if codes.device.type != "cpu":
        return codes.to(torch.float32)
    wide = scratch(name, codes.numel(), torch.float32)
    if codes.is_contiguous():
        return wide.view(codes.shape).copy_(codes)
    return wide.view(codes.shape[::-1]).copy_(codes.t()).t()


def code_product(a: Tensor, b: Tensor, *, native: bool) -> Tensor:
    """Product of codes: exact for integers.

    Args:
        a: (M, K) int8, int16 (shared-exponent integers, or codes beyond int8), or bfloat16 holding values exact in it.
        b: (K, N) likewise.
        native: use the int8 or int16 units.

    Returns:
        (M, N): int32, float32 or float64 holding integers, or bfloat16. Perhaps a buffer that the next call overwrites.
    """
    if a.shape[1] == 0 or a.numel() == 0 or b.numel() == 0:
        return torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    if a.dtype == torch.bfloat16:  # FP8 values: accumulated in float32, the sum rounded to bfloat16 once
        return torch.mm(a, b)
    if native and a.dtype == b.dtype == torch.int8:
        return _int_mm(a, b)
    if native and a.dtype == b.dtype == torch.int16:
        return int16_product(a, b)
    if a.shape[1] <= _FLOAT32_TERMS:
        return torch.mm(_widened("left", a), _widened("right", b))
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64, device=a.device)
    for left, right in zip(a.split(_FLOAT32_TERMS, 1), b.split(_FLOAT32_TERMS, 0), strict=True):
        total += torch.mm(left.to(torch.float32), right.to(torch.float32))
    return total


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
    """``acc * (a * b * factor) + bias`` in one pass; ``acc * (a * factor) * b + bias`` where a or b is a vector.

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
    kernels = library() if acc.device.type == "cpu" and dtype in TYPES else None
    if kernels is None:
        result = acc.to(torch.float32) * (a * b * factor) if one_scale else acc.to(torch.float32) * (a * factor) * b
        result = result if bias is None else result + bias.to(torch.float32)
        return result.to(dtype) if out is None else out.copy_(result)
    acc = (acc.to(torch.float32) if acc.dtype == torch.float64 else acc).contiguous()
    rows, columns = acc.shape
    out = torch.empty(rows, columns, dtype=dtype) if out is None else out
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    if not one_scale:
        a, b = a.expand(rows, 1).contiguous(), b.expand(1, columns).contiguous()
        kernels.eff_scale_rows(
            acc.data_ptr(),
            _SUM_TYPES[acc.dtype],
            rows,
            columns,
            a.data_ptr(),
            b.data_ptr(),
            factor,
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            TYPES[dtype],
            torch.get_num_threads(),
        )
        return out
    kernels.eff_scale(
        acc.data_ptr(),
        _SUM_TYPES[acc.dtype],
        rows,
        columns,
        a.data_ptr(),
        b.data_ptr(),
        factor,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        TYPES[dtype],
        columns,
        torch.get_num_threads(),
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
    """``(a.codes @ b.codes) * (a.scale * b.scale * factor) + bias``, codes (M, K) and (K, N), result (M, N)."""
    terms = a.codes.shape[1]
    if native and a.codes.dtype in FP8 and a.codes.numel() and b.codes.numel():
        return fp8_product(a, b, factor=factor, bias=bias, dtype=dtype)
    if terms <= _INT32_TERMS:
        acc = code_product(a.codes, b.codes, native=native)
        return rescale(acc, a.scale, b.scale, factor=factor, bias=bias, dtype=dtype)
    left, right = a.codes.split(terms // 2 + 1, dim=1), b.codes.split(terms // 2 + 1, dim=0)
    first, second = (
        scaled_product(Codes(x, a.scale), Codes(y, b.scale), native=native, factor=factor, bias=c, dtype=dtype)
        for x, y, c in zip(left, right, (bias, None), strict=True)
    )
    return first + second
