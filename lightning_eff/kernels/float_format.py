"""Rounding to formats of up to eight bits by the compiled kernel; the same numbers from ``functional`` elsewhere.

Float32 and bfloat16 on the CPU take the compiled path, one pass from values to values or codes; float16 is widened to
float32 first (exact). Float64 and other devices and builds take ``functional``.
"""

from __future__ import annotations

import ctypes
import functools
import struct

import torch
from torch import Tensor

from lightning_eff.functional.numerics import float_format as plain
from lightning_eff.functional.numerics.float_format import (
    FloatFormat,
    FloatRounding,
    Infinity,
    check_choices,
    unencodable,
)
from lightning_eff.functional.random import MASK64, draw_seed
from lightning_eff.kernels.operands import FLOATS, TYPES, empty, kernels_for, pointer, prepared, threads

_CODES = 2


def _bits(value: float) -> int:
    """The bits of a float32, as an integer."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


@functools.cache
def _parameters(fmt: FloatFormat, infinity: Infinity) -> ctypes.Array[ctypes.c_int32]:
    nan = -1 if fmt.nan_code is None else fmt.nan_code
    inf = nan if fmt.inf_code is None else fmt.inf_code
    numbers = (_bits(fmt.max), _bits(fmt.min_normal), fmt.mantissa_bits, fmt.bits - 1, nan, inf, infinity == "saturate")
    return (ctypes.c_int32 * len(numbers))(*numbers)


def _convert(
    kernels: ctypes.CDLL,
    x: Tensor,
    fmt: FloatFormat,
    rounding: FloatRounding,
    seed: int | None,
    infinity: Infinity,
    out: Tensor,
) -> bool:
    """Fill ``out``; return whether a value had no code."""
    stochastic = rounding == "stochastic"
    if stochastic:
        seed = draw_seed() if seed is None else seed & MASK64
    bad, n = ctypes.c_int32(), x.numel()
    kernels.eff_float_format(
        pointer("eff_float_format(x)", x, n, *FLOATS),
        TYPES[x.dtype],
        n,
        _parameters(fmt, infinity),
        stochastic,
        seed or 0,
        pointer("eff_float_format(out)", out, n, *FLOATS, torch.uint8),
        TYPES.get(out.dtype, _CODES),
        ctypes.byref(bad),
        threads(),
    )
    return bool(bad.value)


def _library_for(x: Tensor) -> ctypes.CDLL | None:
    return kernels_for(x) if x.dtype in (*FLOATS, torch.float16) else None


def quantize(
    x: Tensor,
    fmt: FloatFormat,
    *,
    rounding: FloatRounding = "nearest",
    seed: int | None = None,
    infinity: Infinity = "propagate",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Round to values of ``fmt``, see :func:`lightning_eff.functional.quantize`; the result is contiguous."""
    check_choices(rounding, infinity)
    kernels = _library_for(x)
    if kernels is None:
        return plain.quantize(x, fmt, rounding=rounding, seed=seed, infinity=infinity, dtype=dtype)
    dtype = dtype or x.dtype
    out = empty(x.shape, dtype if dtype in TYPES else torch.float32)
    _convert(kernels, prepared(x), fmt, rounding, seed, infinity, out)
    return out.to(dtype)


def encode(
    x: Tensor,
    fmt: FloatFormat,
    *,
    rounding: FloatRounding = "nearest",
    seed: int | None = None,
    infinity: Infinity = "propagate",
) -> Tensor:
    """Round to codes of ``fmt``, see :func:`lightning_eff.functional.encode`; the result is contiguous."""
    check_choices(rounding, infinity)
    kernels = _library_for(x)
    if kernels is None:
        return plain.encode(x, fmt, rounding=rounding, seed=seed, infinity=infinity)
    out = empty(x.shape, torch.uint8)
    if _convert(kernels, prepared(x), fmt, rounding, seed, infinity, out):
        raise unencodable(fmt)
    return out
