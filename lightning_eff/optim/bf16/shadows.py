"""Room for the float32 shadows of bfloat16 parameters and of their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_eff.kernels.products import scratch


class Room:
    """Float32 tensors for shadows and gradients; on the CPU pieces of one buffer that is used again in the next part.

    Fresh temporaries of this size cost more in page faults than the whole step.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        size = 2 * sum(_aligned(p.numel()) for p in parameters if p.device.type == "cpu")
        self.free = scratch("shadows", size, torch.float32) if size else None

    def take(self, like: Tensor) -> Tensor:
        """An uninitialised, contiguous float32 tensor of the shape and on the device of ``like``."""
        if self.free is None or like.device.type != "cpu":
            return empty_shadow(like)
        piece, self.free = self.free[: like.numel()], self.free[_aligned(like.numel()) :]
        return piece.view(like.shape)


def empty_shadow(like: Tensor) -> Tensor:
    """An uninitialised, contiguous float32 tensor of its own, of the shape and on the device of ``like``."""
    return torch.empty(like.shape, dtype=torch.float32, device=like.device)


def widened(grad: Tensor | None, room: Room) -> Tensor | None:
    """``grad`` in float32; a sparse one stays sparse and takes no room."""
    if grad is None or grad.layout is not torch.strided:
        return None if grad is None else grad.to(torch.float32)
    return room.take(grad).copy_(grad)


def _aligned(numel: int) -> int:
    return -(-numel // 16) * 16  # 64 bytes
