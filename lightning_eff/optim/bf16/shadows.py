"""The float32 shadows of bfloat16 parameters and of their gradients: made, put in place, written back."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eff.kernels.products import scratch
from lightning_eff.optim.bf16.exchange import exchanged
from lightning_eff.optim.bf16.kept import as_float32, put_kept, take_kept, write_back

PART = 1 << 20
"""Elements that one call of a torch optimizer updates, unless a single parameter is larger."""


def steps_by_itself(original: type[Optimizer]) -> bool:
    """Tell whether a step treats each parameter by itself and keeps no reference to it, as torch's own do."""
    return original.__module__.startswith("torch.optim.")


def parts_of(
    seeds: Mapping[Tensor, int], original: type[Optimizer], done: Container[Tensor] = ()
) -> list[dict[Tensor, int]]:
    """Return which parameters (and their seeds) are updated together: as few as are worth a call, or all.

    torch's own optimizers treat each parameter by itself, so their step may run over a few at a time. Of others
    that is not known: they see all at once. Those that are ``done`` are left out.
    """
    every = {p: seed for p, seed in seeds.items() if p not in done}
    if not steps_by_itself(original):
        return [every]
    parts: list[dict[Tensor, int]] = [{}]
    size = 0
    for p, seed in every.items():
        if p.grad is not None:
            numel = p.numel() if p.dtype is torch.bfloat16 else 0
            if size and size + numel > PART:
                parts.append({})
                size = 0
            parts[-1][p] = seed
            size += numel
    return parts


@contextlib.contextmanager
def on_shadows(
    optimizer: Optimizer, original: type[Optimizer], update: str, part: Mapping[Tensor, int]
) -> Iterator[None]:
    """Put shadows in the places of the bfloat16 parameters that have a gradient; write back what they became."""
    shadows: dict[Tensor, nn.Parameter] = {}
    kept: dict[Tensor, Tensor] = {}
    halves = [p for p in part if p.dtype is torch.bfloat16 and p.grad is not None]
    room = Room(halves if steps_by_itself(original) else [])
    with torch.no_grad():
        for p in halves:
            kept[p] = take_kept(optimizer.state, p, update)
            # torch's CPU addition of a sparse tensor writes past a tensor that does not start its storage.
            dense = p.grad is not None and p.grad.layout is torch.strided
            out = room.take(p) if dense else empty_shadow(p)
            shadows[p] = nn.Parameter(as_float32(p, kept[p], out, update))
            shadows[p].grad = widened(p.grad, room)
    done = False
    try:
        with exchanged(optimizer, {p: shadows.get(p, p) for p in part}):
            yield
        done = True
    finally:
        with torch.no_grad():
            for p in list(shadows):
                shadow = shadows.pop(p)
                if done:
                    write_back(p, shadow, kept[p], update, part[p])
                put_kept(optimizer.state, p, update, kept[p])


class Room:
    """Float32 tensors for shadows and gradients; on the CPU pieces of one buffer that is used again in the next part.

    Fresh temporaries of this size cost more in page faults than the whole step.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        size = 2 * sum(_aligned(p.numel()) for p in parameters if p.device.type == "cpu")
        self.free = scratch("shadows", size, torch.float32) if size else None

    def take(self, like: Tensor) -> Tensor:
        """Return an uninitialised, contiguous float32 tensor of the shape and on the device of ``like``."""
        if self.free is None or like.device.type != "cpu":
            return empty_shadow(like)
        piece, self.free = self.free[: like.numel()], self.free[_aligned(like.numel()) :]
        return piece.view(like.shape)


def empty_shadow(like: Tensor) -> Tensor:
    """Return an uninitialised, contiguous float32 tensor of its own, of the shape and on the device of ``like``."""
    return torch.empty(like.shape, dtype=torch.float32, device=like.device)


def widened(grad: Tensor | None, room: Room) -> Tensor | None:
    """Return ``grad`` in float32; a sparse one stays sparse and takes no room."""
    if grad is None or grad.layout is not torch.strided:
        return None if grad is None else grad.to(torch.float32)
    return room.take(grad).copy_(grad)


def _aligned(numel: int) -> int:
    return -(-numel // 16) * 16  # 64 bytes
