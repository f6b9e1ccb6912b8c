"""LUQ and SAWB codes from the compiled kernels; the same numbers from ``functional`` elsewhere.

Contiguous float32 and bfloat16 tensors on the CPU take the compiled path: one pass for the statistics, one for the
codes. Other devices and builds take ``functional``; other dtypes are widened to float32 first.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lightning_eff import functional
from lightning_eff.functional.formats import Codes
from lightning_eff.functional.luq import Rounding
from lightning_eff.functional.random import draw_seed
from lightning_eff.functional.sawb import COEFFICIENTS, Unsigned
from lightning_eff.kernels.build import library

TYPES = {torch.float32: 0, torch.bfloat16: 1}
_UNSIGNED_MODE = {False: 0, "mirror5": 1, "reference": 2}
_COEFFICIENTS = torch.tensor([COEFFICIENTS[kind][4] for kind in ("signed", "mirror5", "reference")])


def _library_for(x: Tensor) -> ctypes.CDLL | None:
    return library() if x.device.type == "cpu" else None


def _prepared(x: Tensor) -> Tensor:
    x = x.detach()
    return (x if x.dtype in TYPES else x.to(torch.float32)).contiguous()


def sawb_encode(
    x: Tensor, *, unsigned: Unsigned = False, pack: bool = False, out: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Codes, Tensor | None, bool]:
    """INT4 codes of ``x``, unsigned codes where ``unsigned`` allows them and no element is negative.

    Args:
        x: contiguous, any floating dtype.
        unsigned: what to do with tensors that have no negative element; ``False`` treats them as signed.
        pack: also return the codes two to a byte.
        out: int8 buffer of at least ``x.numel()`` elements for the codes; default: a new one.
        scale: the step if known (then ``unsigned`` means what it says); default: measured.

    Returns:
        Codes shaped like ``x``, the packed codes or ``None``, and whether the codes are unsigned.
    """
    x = _prepared(x)
    kernels = _library_for(x)
    if kernels is None:
        is_unsigned = bool(unsigned) and (scale is not None or bool(x.numel() and x.min() >= 0 and x.max() > 0))
        plain = functional.sawb_codes(x, unsigned=unsigned if is_unsigned else False, scale=scale)
        return plain, functional.pack_int4(plain.codes) if pack else None, is_unsigned
    kind, n, threads = TYPES[x.dtype], x.numel(), torch.get_num_threads()
    if scale is None:
        scale, flag = torch.empty((), dtype=torch.float32), ctypes.c_int32()
        kernels.eff_sawb_scale(
            x.data_ptr(),
            kind,
            n,
            _UNSIGNED_MODE[unsigned],
            _COEFFICIENTS.data_ptr(),
            scale.data_ptr(),
            ctypes.byref(flag),
            threads,
        )
        is_unsigned = bool(flag.value)
    else:
        is_unsigned = bool(unsigned)
    codes = (torch.empty(n, dtype=torch.int8) if out is None else out[:n]).view(x.shape)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8) if pack else None
    kernels.eff_sawb_codes(
        x.data_ptr(),
        kind,
        n,
        scale.data_ptr(),
        is_unsigned,
        codes.data_ptr(),
        None if packed is None else packed.data_ptr(),
        threads,
    )
    return Codes(codes, scale), packed, is_unsigned


def unpack_int4(packed: Tensor, numel: int, *, unsigned: bool = False, out: Tensor | None = None) -> Tensor:
    """Undo the packing, see :func:`lightning_eff.functional.unpack_int4`; ``out`` is an int8 buffer to use."""
    kernels = _library_for(packed)
    if kernels is None:
        return functional.unpack_int4(packed, numel, unsigned=unsigned)
    codes = torch.empty(numel, dtype=torch.int8) if out is None else out[:numel]
    kernels.eff_unpack(packed.data_ptr(), numel, unsigned, codes.data_ptr(), torch.get_num_threads())
    return codes


def fingerprint(x: Tensor) -> int:
    """A number that changes, almost surely, when a dense tensor is overwritten; 0 where there is no cheap way."""
    if x.device.type != "cpu":
        return 0
    present = x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()  # less than numel when expanded
    size = min(x.numel() * x.element_size(), present)
    kernels = library()
    if kernels is not None:
        return int(kernels.eff_fingerprint(x.data_ptr(), size))
    step = max(size // x.element_size() // 64, 1)
    return hash(tuple(x.detach().as_strided((size // x.element_size() // step,), (step,)).tolist()))


def largest_magnitude(x: Tensor) -> Tensor:
    """Largest magnitude, 0-d float32, NaN if any element is NaN; zero for an empty tensor."""
    x = _prepared(x)
    kernels = _library_for(x)
    if kernels is None:
        return x.abs().max().to(torch.float32) if x.numel() else torch.zeros((), dtype=torch.float32, device=x.device)
    result = torch.empty((), dtype=torch.float32)
    kernels.eff_max_abs(x.data_ptr(), TYPES[x.dtype], x.numel(), result.data_ptr(), torch.get_num_threads())
    return result


def luq_codes(
    x: Tensor,
    *,
    levels: int = 7,
    max_abs: Tensor | float | None = None,
    power_of_two: bool = False,
    rounding: Rounding = "luq",
    seed: int | None = None,
    out: Tensor | None = None,
    observed: Tensor | None = None,
) -> Codes:
    """FP4 codes of a gradient, see :func:`lightning_eff.functional.luq_codes`.

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
    x = _prepared(x)
    kernels = _library_for(x)
    if kernels is None or not 2 <= levels <= 7 or rounding != "luq":
        if observed is not None:
            observed.copy_(largest_magnitude(x))
        return functional.luq_codes(
            x, levels=levels, max_abs=max_abs, power_of_two=power_of_two, rounding=rounding, seed=seed
        )
    largest = largest_magnitude(x) if max_abs is None else torch.as_tensor(max_abs, dtype=torch.float32)
    seed = draw_seed() if seed is None else seed
    alpha, n = torch.empty((), dtype=torch.float32), x.numel()
    codes = (torch.empty(n, dtype=torch.int8) if out is None else out[:n]).view(x.shape)
    kernels.eff_luq_scale(largest.data_ptr(), levels, power_of_two, alpha.data_ptr())
    kernels.eff_luq_codes(
        x.data_ptr(),
        TYPES[x.dtype],
        n,
        alpha.data_ptr(),
        largest.data_ptr(),
        levels,
        seed,
        codes.data_ptr(),
        None if observed is None else observed.data_ptr(),
        torch.get_num_threads(),
    )
    return Codes(codes, alpha)


def sawb_codes(x: Tensor, *, bits: int = 4, unsigned: Unsigned = False, scale: Tensor | None = None) -> Codes:
    """INT4 codes, see :func:`lightning_eff.functional.sawb_codes`."""
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
