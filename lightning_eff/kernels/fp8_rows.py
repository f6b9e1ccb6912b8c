"""FP8 casts of matrices with a scale for each row or column: ``functional.fp8_codes(x, dim=...)``, bit for bit.

A linear layer's matrices are in two products each, which sum over different dimensions: :func:`fp8_encode_both` makes
both casts in two readings. What a code is on the CPU stands in :mod:`lightning_eff.kernels.fp8`.
"""

from __future__ import annotations

import ctypes
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_eff import functional
from lightning_eff.functional.codes import Codes
from lightning_eff.kernels.operands import (
    FLOATS,
    FP8_FORMATS,
    TYPES,
    buffer,
    empty,
    kernels_for,
    pointer,
    prepared,
    threads,
)


def fp8_encode_along(
    x: Tensor,
    dtype: torch.dtype,
    dim: Literal[0, 1],
    *,
    power_of_two: bool = False,
    keep: bool = False,
    out: Tensor | None = None,
) -> tuple[Codes, Tensor | None]:
    """Return FP8 values of a matrix as bfloat16 codes, and the FP8 tensor itself if ``keep``.

    Args:
        x: (M, K), any floating dtype.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        dim: the dimension a product will sum over: 1 for a scale per row, 0 for one per column.
        power_of_two: see :func:`lightning_eff.functional.fp8_scale`.
        keep: also return the codes as ``dtype``, one byte each.
        out: bfloat16 buffer of at least ``x.numel()`` elements; default: a new one.

    Returns:
        Codes (M, K) with the scale (M, 1) or (1, K); zero and NaN in rows (columns) that hold NaN or Inf. The FP8
        tensor or ``None``.
    """
    x, kernels = _prepared(x, dtype)
    if kernels is None:
        plain = functional.fp8_codes(x, dtype, power_of_two=power_of_two, dim=dim)
        return Codes(_widened(plain.codes, out), plain.scale), plain.codes if keep else None
    made = _allocated(x, dim, kept=dtype if keep else None, out=out)
    by_row, by_column = (made, None) if dim == 1 else (None, made)
    _encode(kernels, x, dtype, power_of_two, by_row, by_column)
    return Codes(made.values, made.scale), made.kept


def fp8_encode_both(
    x: Tensor,
    dtype: torch.dtype,
    *,
    power_of_two: bool = False,
    keep_columns: bool = False,
    out: Tensor | None = None,
    out_columns: Tensor | None = None,
) -> tuple[Codes, Codes]:
    """Return FP8 values of a matrix with a scale per row, and with a scale per column.

    Args:
        x: (M, K), any floating dtype.
        dtype: see :func:`fp8_encode_along`.
        power_of_two: see there.
        keep_columns: the second codes as ``dtype``, one byte each: what is kept for backward.
        out: bfloat16 buffer for the first codes, see there.
        out_columns: bfloat16 buffer for the second codes, if they are not kept.

    Returns:
        Codes (M, K) with the scale (M, 1), as from ``dim=1``; codes (M, K) with the scale (1, K), as from ``dim=0``.
    """
    x, kernels = _prepared(x, dtype)
    if kernels is None:
        rows, columns = (functional.fp8_codes(x, dtype, power_of_two=power_of_two, dim=dim) for dim in (1, 0))
        second = columns.codes if keep_columns else _widened(columns.codes, out_columns)
        return Codes(_widened(rows.codes, out), rows.scale), Codes(second, columns.scale)
    by_row = _allocated(x, 1, kept=None, out=out)
    by_column = _allocated(x, 0, kept=dtype if keep_columns else None, out=out_columns, values=not keep_columns)
    _encode(kernels, x, dtype, power_of_two, by_row, by_column)
    second = by_column.values if by_column.kept is None else by_column.kept
    return Codes(by_row.values, by_row.scale), Codes(second, by_column.scale)


def _prepared(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ctypes.CDLL | None]:
    """``x`` as the kernels read it, and the kernels if they serve; that ``dtype`` is no format, ``functional`` says."""
    x = prepared(x)
    return x, kernels_for(x) if dtype in FP8_FORMATS else None


def _widened(codes: Tensor, out: Tensor | None) -> Tensor:
    return codes.to(torch.bfloat16) if out is None else out[: codes.numel()].view(codes.shape).copy_(codes)


class _Lines(NamedTuple):
    """What the kernel fills for one direction: scales (M, 1) or (1, K), bytes and bfloat16 values (M, K)."""

    scale: Tensor
    kept: Tensor | None
    values: Tensor

    def pointers(self, n: int, dtype: torch.dtype) -> tuple[int, int | None, int | None]:
        """Return the addresses, null for what is not wanted, and for what is empty."""
        return (
            pointer("eff_fp8_encode_lines(scales)", self.scale, self.scale.numel(), torch.float32),
            pointer("eff_fp8_encode_lines(codes)", self.kept, n, dtype),
            pointer("eff_fp8_encode_lines(values)", self.values, n, torch.bfloat16) if self.values.numel() else None,
        )


def _allocated(x: Tensor, dim: int, *, kept: torch.dtype | None, out: Tensor | None, values: bool = True) -> _Lines:
    shape = (x.shape[0], 1) if dim == 1 else (1, x.shape[1])
    codes = None if kept is None else empty(x.shape, kept)
    made = buffer(out, x.shape, x.numel(), torch.bfloat16) if values else empty((0,), torch.bfloat16)
    return _Lines(empty(shape, torch.float32), codes, made)


def _encode(
    kernels: ctypes.CDLL,
    x: Tensor,
    dtype: torch.dtype,
    power_of_two: bool,
    by_row: _Lines | None,
    by_column: _Lines | None,
) -> None:
    n = x.numel()
    kernels.eff_fp8_encode_lines(
        pointer("eff_fp8_encode_lines(x)", x, n, *FLOATS),
        TYPES[x.dtype],
        *x.shape,
        FP8_FORMATS[dtype],
        power_of_two,
        *((None, None, None) if by_row is None else by_row.pointers(n, dtype)),
        *((None, None, None) if by_column is None else by_column.pointers(n, dtype)),
        threads(),
    )
