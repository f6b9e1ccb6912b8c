"""Shared-exponent integers by the compiled kernel, one pass each; the same numbers from ``functional`` elsewhere.

Float32 and bfloat16 on the CPU take the compiled path; other floating dtypes are widened to float32 first, other
devices and builds take ``functional``. The pass also measures the largest magnitude, which is what Autoflex predicts
the next scale from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.functional.codes import Codes
from lightning_eff.functional.numerics import dfp16, flexpoint
from lightning_eff.functional.numerics.flexpoint import IntegerRounding
from lightning_eff.functional.random import MASK64, draw_seed
from lightning_eff.kernels.operands import (
    CPU,
    FLOATS,
    TYPES,
    buffer,
    empty,
    kernels_for,
    pointer,
    prepared,
    threads,
    wrote,
)
from lightning_eff.kernels.quantize import largest_magnitude


def integer_encode(
    x: Tensor,
    scale: Tensor,
    *,
    bits: int = 16,
    symmetric: bool = False,
    rounding: IntegerRounding = "nearest",
    seed: int | None = None,
    out: Tensor | None = None,
    observed: Tensor | None = None,
) -> Codes:
    """Return integers in units of a given scale, see :func:`lightning_eff.functional.integer_codes`.

    Args:
        x: any floating tensor.
        scale: 0-d float32 on the device of ``x``, a power of two in 2^-126 .. 2^100.
        bits: see there, as ``symmetric``, ``rounding`` and ``seed``.
        symmetric: see there; False for Flexpoint, True for DFP-16.
        rounding: see there.
        seed: see there.
        out: int16 buffer of at least ``x.numel()`` elements for the codes; default: a new one.
        observed: 0-d float32 that receives max|x| before saturation, measured in the same pass; it is not finite when
            ``x`` holds NaN or Inf.

    Returns:
        int16 codes of the shape of ``x``, contiguous, and the scale, a tensor of its own; all zero and NaN when ``x``
        or the scale is not finite.

    Raises:
        ConfigurationError: ``bits`` or ``rounding`` is not allowed.
    """
    flexpoint.check_integer_format(bits, rounding)
    x = prepared(x)
    kernels = kernels_for(x)
    if kernels is None:
        _observe(x, observed)
        plain = flexpoint.integer_codes(x, scale, bits=bits, symmetric=symmetric, rounding=rounding, seed=seed)
        return plain if out is None else Codes(out[: x.numel()].view(x.shape).copy_(plain.codes), plain.scale)
    n, stochastic, kept = x.numel(), rounding == "stochastic", empty((), torch.float32)
    codes = buffer(out, x.shape, n, torch.int16)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=CPU)
    kernels.eff_integer_encode(
        pointer("eff_integer_encode(x)", x, n, *FLOATS),
        TYPES[x.dtype],
        n,
        pointer("eff_integer_encode(scale)", scale, 1, torch.float32),
        bits,
        symmetric,
        stochastic,
        (draw_seed() if seed is None else seed) & MASK64 if stochastic else 0,
        pointer("eff_integer_encode(codes)", codes, n, torch.int16),
        pointer("eff_integer_encode(kept)", kept, 1, torch.float32),
        pointer("eff_integer_encode(observed)", observed, 1, torch.float32),
        threads(),
    )
    return Codes(codes, kept)


def round_to_scale_(x: Tensor, scale: Tensor, *, bits: int = 16, observed: Tensor | None = None) -> Tensor:
    """Overwrite ``x`` with :func:`lightning_eff.functional.round_to_scale` of it: a write in Flexpoint.

    NaN and Inf stay where they are, all other elements are rounded. Whether a broken tensor is an error is for the
    caller to decide, who sees it in ``observed``.

    Args:
        x: any floating tensor; one pass in place for contiguous float32 and bfloat16. Its version counter moves, as
            after any in-place operation.
        scale: 0-d float32 on the device of ``x``, a power of two in 2^-126 .. 2^100.
        bits: N, 4..16.
        observed: 0-d float32 that receives max|x| before rounding, as in :func:`integer_encode`.

    Returns:
        ``x``.

    Raises:
        ConfigurationError: ``bits`` is not allowed.
    """
    flexpoint.check_integer_format(bits)
    plain = x.detach()
    in_place = plain.dtype in TYPES and plain.is_contiguous() and not plain.is_neg()
    kernels = kernels_for(plain) if in_place else None
    if kernels is None:
        _observe(plain, observed)
        plain.copy_(flexpoint.round_to_scale(plain, scale, bits=bits))
        return x
    scale = torch.as_tensor(scale, dtype=torch.float32, device=CPU)
    kernels.eff_round_to_scale(
        pointer("eff_round_to_scale(x)", plain, plain.numel(), *FLOATS),
        TYPES[plain.dtype],
        plain.numel(),
        pointer("eff_round_to_scale(scale)", scale, 1, torch.float32),
        bits,
        pointer("eff_round_to_scale(observed)", observed, 1, torch.float32),
        threads(),
    )
    wrote(x)
    return x


def dfp_encode(x: Tensor, *, bits: int = 16, out: Tensor | None = None) -> Codes:
    """Return DFP-16 codes, see :func:`lightning_eff.functional.dfp_codes`: one pass for the maximum, one for the codes.

    Args:
        x: any floating tensor.
        bits: see there.
        out: int16 buffer of at least ``x.numel()`` elements for the codes; default: a new one.

    Raises:
        ConfigurationError: ``bits`` is not allowed.
    """
    x = prepared(x)
    scale = dfp16.dfp_scale(largest_magnitude(x), bits=bits)
    return integer_encode(x, scale, bits=bits, symmetric=True, out=out)


def _observe(x: Tensor, observed: Tensor | None) -> None:
    if observed is not None:
        observed.copy_(largest_magnitude(x))
