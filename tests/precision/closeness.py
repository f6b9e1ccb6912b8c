"""How close a product of quantised operands is to one written out by hand."""

from __future__ import annotations

import torch

BF16 = 2.0**-8
"""Relative rounding of a sum to bfloat16, the one rounding beside the casts."""


def close(ours: torch.Tensor | None, theirs: torch.Tensor, terms: int) -> None:
    """Equal up to the rounding of the sum to bfloat16 and of its float32 accumulation, relative to its terms."""
    assert ours is not None
    assert ((ours - theirs).abs() <= BF16 * theirs.abs() + 1e-6 * terms * theirs.abs().max()).all()
