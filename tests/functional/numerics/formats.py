"""Every kind of float format of up to eight bits, and every float16."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.functional.numerics.float_format import FloatFormat

SPLITS = [(e, total - e) for total in range(1, 8) for e in range(total + 1)]
FORMATS = [FloatFormat(e, m) for e, m in SPLITS]
FORMATS += [FloatFormat(e, m, special="fn") for e, m in SPLITS if e >= 1 and e + m >= 2]
FORMATS += [FloatFormat(e, m, special="ieee") for e, m in SPLITS if e >= 2 and m >= 1]
FORMATS += [FloatFormat(4, 3, bias=20), FloatFormat(5, 2, bias=-3), FloatFormat(0, 7, bias=6)]


def name(fmt: FloatFormat) -> str:
    """Return a short name, unique among these."""
    return f"E{fmt.exponent_bits}M{fmt.mantissa_bits}-{fmt.special}-{fmt.bias}"


def all_float16() -> Tensor:
    """Return every float16 there is, NaN and Inf as well."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
