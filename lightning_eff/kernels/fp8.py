"""FP8 casts with the numbers of :mod:`lightning_eff.functional.numerics.fp8`, one pass each, and products on FP8 units.

On the CPU a code is used as the bfloat16 number it stands for (exact), because products of bfloat16 are what the
processor has; the byte is what is kept for backward. GPUs from compute capability 8.9 on multiply the bytes themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff import functional
from lightning_eff.functional.codes import Codes
from lightning_eff.functional.numerics.fp8 import LARGEST, largest_along
from lightning_eff.kernels.operands import (
    CPU,
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
from lightning_eff.kernels.quantize import largest_magnitude

ALIGNMENT = 16
"""What CUDA wants the inner and the right outer size of an FP8 product to be a multiple of."""


def fp8_encode(
    x: Tensor,
    dtype: torch.dtype,
    *,
    power_of_two: bool = False,
    keep: bool = False,
    out: Tensor | None = None,
    max_abs: float | None = None,
    observed: Tensor | None = None,
) -> tuple[Codes, Tensor | None]:
    """Return FP8 values of ``x`` as bfloat16 codes, and the FP8 tensor itself if ``keep``.

    Args:
        x: any floating tensor.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        power_of_two: see :func:`lightning_eff.functional.fp8_scale`.
        keep: also return the codes as ``dtype``, one byte each.
        out: bfloat16 buffer of at least ``x.numel()`` elements; default: a new one.
        max_abs: what to scale for (delayed scaling): one pass less. Default: the largest magnitude of ``x``.
        observed: with ``max_abs``, a 0-d float32 tensor that receives the largest magnitude (not finite if ``x`` is
            not).
    """
    x = prepared(x)
    kernels = kernels_for(x)
    if max_abs is not None and observed is None:
        observed = torch.empty((), dtype=torch.float32, device=x.device)
    if kernels is None:
        plain, kept = _encode_plain(x, dtype, power_of_two, max_abs, observed)
        return Codes(plain.codes.to(torch.bfloat16), plain.scale), kept if keep else None
    n, scale = x.numel(), empty((2,), torch.float32)
    largest = largest_magnitude(x) if max_abs is None else torch.tensor(max_abs, dtype=torch.float32, device=CPU)
    kernels.eff_fp8_scale(
        pointer("eff_fp8_scale(max_abs)", largest, 1, torch.float32),
        LARGEST[dtype],
        power_of_two,
        pointer("eff_fp8_scale(scale)", scale, 2, torch.float32),
    )
    values = buffer(out, x.shape, n, torch.bfloat16)
    bytes_ = empty(x.shape, dtype) if keep else None
    kernels.eff_fp8_encode(
        pointer("eff_fp8_encode(x)", x, n, *FLOATS),
        TYPES[x.dtype],
        n,
        pointer("eff_fp8_encode(scale)", scale, 2, torch.float32),
        FP8_FORMATS[dtype],
        pointer("eff_fp8_encode(codes)", bytes_, n, dtype),
        pointer("eff_fp8_encode(values)", values, n, torch.bfloat16),
        None if max_abs is None else pointer("eff_fp8_encode(observed)", observed, 1, torch.float32),
        threads(),
    )
    return Codes(values, scale[0]), bytes_


def _encode_plain(
    x: Tensor, dtype: torch.dtype, power_of_two: bool, max_abs: float | None, observed: Tensor | None
) -> tuple[Codes, Tensor]:
    if observed is not None:
        observed.copy_(largest_along(x))
    largest = None if max_abs is None else torch.full((), max_abs, dtype=torch.float32, device=x.device)
    codes = functional.fp8_codes(x, dtype, power_of_two=power_of_two, max_abs=largest)
    return codes, codes.codes


def fp8_decode(codes: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return the bfloat16 values of finite FP8 ``codes``; ``out`` is a bfloat16 buffer to use."""
    kernels = kernels_for(codes)
    if kernels is None:
        return codes.to(torch.bfloat16)
    codes, n = codes.contiguous(), codes.numel()
    values = buffer(out, codes.shape, n, torch.bfloat16)
    kernels.eff_fp8_decode(
        pointer("eff_fp8_decode(codes)", codes, n, *FP8_FORMATS),
        n,
        FP8_FORMATS[codes.dtype],
        pointer("eff_fp8_decode(values)", values, n, torch.bfloat16),
        threads(),
    )
    return values


def fp8_product(
    a: Codes, b: Codes, *, factor: float = 1.0, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return ``(a.codes @ b.codes) * a.scale * b.scale * factor + bias`` from FP8 units, sums in float32.

    CUDA's rules are met here: the left operand row-major, the right one column-major, sizes padded with zeros to
    multiples of :data:`ALIGNMENT`, bfloat16 results where there is a scale for each row.

    Args:
        a: FP8 codes (M, K), not both E5M2; scale 0-d or (M, 1).
        b: FP8 codes (K, N); scale 0-d or (1, N).
        factor: constant.
        bias: (N,) or None.
        dtype: of the result (M, N).
    """
    (m, k), n = a.codes.shape, b.codes.shape[1]
    left = _padded(a.codes, 0, -k % ALIGNMENT)
    right = _padded(b.codes.t(), -n % ALIGNMENT, -k % ALIGNMENT).t()
    rowwise = a.scale.dim() == 2
    scales = a.scale * factor, b.scale
    if rowwise:  # views with the strides CUDA wants, which sizes of one leave open
        padded = torch.nn.functional.pad(b.scale.reshape(-1), (0, -n % ALIGNMENT))
        scales = scales[0].reshape(-1).view(m, 1), padded.view(1, -1)
    result = torch._scaled_mm(
        left, right, scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16 if rowwise else torch.float32
    )[:m, :n]
    result = result if bias is None else result.to(torch.float32) + bias.to(torch.float32)
    return result.to(dtype)


def _padded(codes: Tensor, rows: int, columns: int) -> Tensor:
    """Row-major ``codes`` with zeros added (as bytes: a zero byte is zero in every FP8 format)."""
    if not rows and not columns:
        return codes.contiguous()
    return torch.nn.functional.pad(codes.contiguous().view(torch.uint8), (0, columns, 0, rows)).view(codes.dtype)
