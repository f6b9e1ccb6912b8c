"""Quantised tensors as integer codes and one scale, and INT4 codes packed two to a byte."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
"""Smallest normal float32: no scale is smaller, so that no scale is subnormal or zero."""


class Codes(NamedTuple):
    """A quantised tensor: ``value = codes * scale``.

    Attributes:
        codes: integers, exact in the given dtype, shape of the tensor they stand for.
        scale: float32 tensor, 0-d or, with a scale for each row, broadcastable to ``codes``; NaN where the tensor held
            NaN or Inf, so that the damage stays visible.
    """

    codes: Tensor
    scale: Tensor

    def t(self) -> Codes:
        """Return the transposed matrix."""
        return Codes(self.codes.t(), self.scale.t())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``codes * scale``, computed in float32, in ``dtype``."""
        return (self.codes.to(torch.float32) * self.scale).to(dtype)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes of four bits (-8..7 or 0..15) two to a byte, low nibble first.

    Args:
        codes: int8, any shape, read in row-major order.

    Returns:
        uint8 of shape ``(ceil(numel / 2),)``.

    Example:
        >>> unpack_int4(pack_int4(torch.tensor([-7, 3, 7], dtype=torch.int8)), 3)
        tensor([-7,  3,  7], dtype=torch.int8)
    """
    nibbles = codes.reshape(-1).to(torch.uint8) & 0x0F
    if nibbles.numel() % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    return nibbles[0::2] | (nibbles[1::2] << 4)


def unpack_int4(packed: Tensor, numel: int, *, unsigned: bool = False) -> Tensor:
    """Undo :func:`pack_int4`.

    Args:
        packed: uint8 of shape ``(ceil(numel / 2),)``.
        numel: number of codes.
        unsigned: read a nibble as 0..15 instead of -8..7.

    Returns:
        int8 of shape ``(numel,)``.
    """
    nibbles = torch.stack([packed & 0x0F, packed >> 4], dim=1).reshape(-1)[:numel].to(torch.int8)
    return nibbles if unsigned else (nibbles ^ 8) - 8
