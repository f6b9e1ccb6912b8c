"""LUQ and SAWB codes from the compiled kernels; the same numbers from ``functional`` elsewhere.

Contiguous float32 and bfloat16 tensors on the CPU take the compiled path: one pass for the statistics, one for the
codes. Other devices and builds take ``functional``; other dtypes are widened to float32 first.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lightning_eff import functional
from lightning_eff.functional.codes import Codes
from lightning_eff.functional.numerics.luq import GradientRounding
from lightning_eff.functional.numerics.sawb import COEFFICIENTS, Unsigned
from lightning_eff.functional.random import MASK64, draw_seed
from lightning_eff.kernels.operands import (
    CPU,
    FLOATS,
    TYPES,
    buffer,
    empty,
    kernels_for,
    memory,
    pointer,
    prepared,
    threads,
)

_UNSIGNED_MODE = {False: 0, "mirror5": 1, "reference": 2}
_COEFFICIENTS = torch.tensor(
    [COEFFICIENTS[kind][4] for kind in ("signed", "mirror5", "reference")], dtype=torch.float32, device=CPU
)


def sawb_encode(
    x: Tensor, *, unsigned: Unsigned = False, pack: bool = False, out: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Codes, Tensor | None, bool]:
    """Return INT4 codes of ``x``, unsigned ones where ``unsigned`` allows them and no element is negative.

    Args:
        x: contiguous, any floating dtype.
        unsigned: what to do with tensors that have no negative element; ``False`` treats them as signed.
        pack: also return the codes two to a byte.
        out: int8 buffer of at least ``x.numel()`` elements for the codes; default: a new one.
        scale: the step if known (then ``unsigned`` means what it says); default: measured.

    Returns:
        Codes shaped like ``x``, the packed codes or ``None``, and whether the codes are unsigned.
    """
    x = prepared(x)
    kernels = kernels_for(x)
    if kernels is None:
        is_unsigned = bool(unsigned) and (scale is not None or bool(x.numel() and x.min() >= 0 and x.max() > 0))
        plain = functional.sawb_codes(x, unsigned=unsigned if is_unsigned else False, scale=scale)
        return plain, functional.pack_int4(plain.codes) if pack else None, is_unsigned
    kind, n = TYPES[x.dtype], x.numel()
    if scale is None:
        scale, flag = empty((), torch.float32), ctypes.c_int32()
        kernels.eff_sawb_scale(
            pointer("eff_sawb_scale(x)", x, n, *FLOATS),
            kind,
            n,
            _UNSIGNED_MODE[unsigned],
            pointer("eff_sawb_scale(coefficients)", _COEFFICIENTS, 6, torch.float32),
            pointer("eff_sawb_scale(scale)", scale, 1, torch.float32),
            ctypes.byref(flag),
            threads(),
        )
        is_unsigned = bool(flag.value)
    else:
        scale, is_unsigned = torch.as_tensor(scale, dtype=torch.float32, device=CPU), bool(unsigned)
    codes = buffer(out, x.shape, n, torch.int8)
    packed = empty(((n + 1) // 2,), torch.uint8) if pack else None
    kernels.eff_sawb_codes(
        pointer("eff_sawb_codes(x)", x, n, *FLOATS),
        kind,
        n,
        pointer("eff_sawb_codes(scale)", scale, 1, torch.float32),
        is_unsigned,
        pointer("eff_sawb_codes(codes)", codes, n, torch.int8),
        pointer("eff_sawb_codes(packed)", packed, (n + 1) // 2, torch.uint8),
        threads(),
    )
    return Codes(codes, scale), packed, is_unsigned


def unpack_int4(packed: Tensor, numel: int, *, unsigned: bool = False, out: Tensor | None = None) -> Tensor:
    """Undo the packing, see :func:`lightning_eff.functional.unpack_int4`; ``out`` is an int8 buffer to use."""
    kernels = kernels_for(packed)
    if kernels is None:
        return functional.unpack_int4(packed, numel, unsigned=unsigned)
    codes = buffer(out, (numel,), numel, torch.int8)
    kernels.eff_unpack(
        pointer("eff_unpack(packed)", packed, (numel + 1) // 2, torch.uint8),
        numel,
        unsigned,
        pointer("eff_unpack(codes)", codes, numel, torch.int8),
        threads(),
    )
    return codes


def fingerprint(x: Tensor) -> int:
    """Return a number that changes, almost surely, if a dense tensor is overwritten; 0 where there is no cheap way."""
    if not x.is_cpu:
        return 0
    address, size = memory(x)
    kernels = kernels_for(x)
    if kernels is not None:
        return int(kernels.eff_fingerprint(address, size))
    step = max(size // x.element_size() // 64, 1)
    return hash(tuple(x.detach().as_strided((size // x.element_size() // step,), (step,)).tolist()))


def largest_magnitude(x: Tensor) -> Tensor:
    """Return the largest magnitude, 0-d float32, NaN if any element is NaN; zero for an empty tensor."""
    x = prepared(x)
    kernels = kernels_for(x)
    if kernels is None:
        return x.abs().max().to(torch.float32) if x.numel() else torch.zeros((), dtype=torch.float32, device=x.device)
    result, n = empty((), torch.float32), x.numel()
    kernels.eff_max_abs(
        pointer("eff_max_abs(x)", x, n, *FLOATS),
        TYPES[x.dtype],
        n,
        pointer("eff_max_abs(result)", result, 1, torch.float32),
        threads(),
    )
    return result


def luq_codes(
    x: Tensor,
    *,
    levels: int = 7,
    max_abs: Tensor | float | None = None,
    power_of_two: bool = False,
    rounding: GradientRounding = "luq",
    seed: int | None = None,
    out: Tensor | None = None,
    observed: Tensor | None = None,
) -> Codes:
    """Return FP4 codes of a gradient, see :func:`lightning_eff.functional.luq_codes`.

    Args:
        x: see there, as ``levels``, ``max_abs``, ``power_of_two``, ``rounding`` and ``seed``.
        levels: see there.
        max_abs: see there.
        power_of_two: see there.
        rounding: see there.
        seed: see there.
        out: int8 buffer of at least ``x.numel()`` elements for the codes; default: a new one.
        observed: 0-d float32 that receives the true maximum, measured in the same pass.
    """
    x = prepared(x)
    kernels = kernels_for(x)
    if kernels is None or not 2 <= levels <= 7 or rounding != "luq":
        if observed is not None:
            observed.copy_(largest_magnitude(x))
        return functional.luq_codes(
            x, levels=levels, max_abs=max_abs, power_of_two=power_of_two, rounding=rounding, seed=seed
        )
    largest = largest_magnitude(x) if max_abs is None else torch.as_tensor(max_abs, dtype=torch.float32, device=CPU)
    alpha, n = empty((), torch.float32), x.numel()
    codes = buffer(out, x.shape, n, torch.int8)
    kernels.eff_luq_scale(
        pointer("eff_luq_scale(max_abs)", largest, 1, torch.float32),
        levels,
        power_of_two,
        pointer("eff_luq_scale(alpha)", alpha, 1, torch.float32),
    )
    kernels.eff_luq_codes(
        pointer("eff_luq_codes(x)", x, n, *FLOATS),
        TYPES[x.dtype],
        n,
        pointer("eff_luq_codes(alpha)", alpha, 1, torch.float32),
        pointer("eff_luq_codes(max_abs)", largest, 1, torch.float32),
        levels,
        (draw_seed() if seed is None else seed) & MASK64,
        pointer("eff_luq_codes(codes)", codes, n, torch.int8),
        pointer("eff_luq_codes(observed)", observed, 1, torch.float32),
        threads(),
    )
    return Codes(codes, alpha)


def sawb_codes(x: Tensor, *, bits: int = 4, unsigned: Unsigned = False, scale: Tensor | None = None) -> Codes:
    """Return INT4 codes, see :func:`lightning_eff.functional.sawb_codes`."""
    if bits == 4:
        codes, _, is_unsigned = sawb_encode(x, unsigned=unsigned, scale=scale)
        if is_unsigned == bool(unsigned):
            return codes
    return functional.sawb_codes(x, bits=bits, unsigned=unsigned, scale=scale)


def sawb_quantize(x: Tensor, *, bits: int = 4, unsigned: Unsigned = False) -> Tensor:
    """See :func:`lightning_eff.functional.sawb_quantize`."""
    return sawb_codes(x, bits=bits, unsigned=unsigned).dequantize(x.dtype)


def luq_quantize(
    x: Tensor,
    *,
    levels: int = 7,
    max_abs: Tensor | float | None = None,
    power_of_two: bool = False,
    seed: int | None = None,
) -> Tensor:
    """See :func:`lightning_eff.functional.luq_quantize`."""
    return luq_codes(x, levels=levels, max_abs=max_abs, power_of_two=power_of_two, seed=seed).dequantize(x.dtype)
