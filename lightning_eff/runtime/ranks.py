"""Ranks of the default process group; a process without one is rank 0 of 1."""

from __future__ import annotations

import torch
import torch.distributed as dist

__all__ = ["has_group", "rank", "seed_of_rank_0", "world_size"]


def has_group() -> bool:
    """Return whether a default process group has been formed."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if has_group() else 0


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if has_group() else 1


def seed_of_rank_0() -> int:
    """Return ``torch.initial_seed()`` of rank 0: ranks that hold the same weights have to round them alike."""
    seed = [torch.initial_seed()]
    if world_size() > 1:
        dist.broadcast_object_list(seed, src=0)
    return seed[0]
