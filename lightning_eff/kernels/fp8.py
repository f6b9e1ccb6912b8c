"""FP8 casts with the numbers of :mod:`lightning_eff.functional.fp8`, one pass each.

On the CPU a code is used as the bfloat16 number it stands for (exact), because products of bfloat16 are what the
processor has; the byte is what is kept for backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff import functional
from lightning_eff.functional.formats import Codes
from lightning_eff.functional.fp8 import E4M3, E5M2, LARGEST
from lightning_eff.kernels.build import library
from lightning_eff.kernels.quantize import TYPES, largest_magnitude

_FORMATS = {E4M3: 0, E5M2: 1}


def fp8_encode(
    x: Tensor, dtype: torch.dtype, *, power_of_two: bool = False, keep: bool = False, out: Tensor | None = None
) -> tuple[Codes, Tensor | None]:
    """FP8 values of ``x`` as bfloat16 codes, and the FP8 tensor itself if ``keep``.

    Args:
        x: any floating tensor.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        power_of_two: see :func:`lightning_eff.functional.fp8_scale`.
        keep: also return the codes as ``dtype``, one byte each.
        out: bfloat16 buffer of at least ``x.numel()`` elements; default: a new one.
    """
    x = x.detach()
    x = (x if x.dtype in TYPES else x.to(torch.float32)).contiguous()
    kernels = library() if x.device.type == "cpu" else None
    if kernels is None:
        plain = functional.fp8_codes(x, dtype, power_of_two=power_of_two)
        return Codes(plain.codes.to(torch.bfloat16), plain.scale), plain.codes if keep else None
    n, threads, scale = x.numel(), torch.get_num_threads(), torch.empty(2)
    largest = largest_magnitude(x)
    kernels.eff_fp8_scale(largest.data_ptr(), LARGEST[dtype], power_of_two, scale.data_ptr())
    values = (torch.empty(n, dtype=torch.bfloat16) if out is None else out[:n]).view(x.shape)
    kept = torch.empty(x.shape, dtype=dtype) if keep else None
    pointer = None if kept is None else kept.data_ptr()
    kernels.eff_fp8_encode(
        x.data_ptr(), TYPES[x.dtype], n, scale.data_ptr(), _FORMATS[dtype], pointer, values.data_ptr(), threads
    )
    return Codes(values, scale[0]), kept


def fp8_decode(codes: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The bfloat16 values of finite FP8 ``codes``; ``out`` is a bfloat16 buffer to use."""
    kernels = library() if codes.device.type == "cpu" else None
    if kernels is None:
        return codes.to(torch.bfloat16)
    codes, n = codes.contiguous(), codes.numel()
    values = (torch.empty(n, dtype=torch.bfloat16) if out is None else out[:n]).view(codes.shape)
    kernels.eff_fp8_decode(codes.data_ptr(), n, _FORMATS[codes.dtype], values.data_ptr(), torch.get_num_threads())
    return values
