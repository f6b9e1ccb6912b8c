"""Ranks of the default process group and what rank 0 tells them; a process without a group is rank 0 of 1."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eff.errors import EffError

__all__ = [
    "broadcast_tensors",
    "broadcast_weights",
    "find_on_rank_0",
    "gather_on_rank_0",
    "has_group",
    "rank",
    "seed_of_rank_0",
    "world_size",
]

_BROADCAST_BYTES = 250 << 20
"""Tensors that are broadcast together; the size DistributedDataParallel uses."""
T = TypeVar("T")


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


def broadcast_weights(model: nn.Module) -> None:
    """Give every rank the parameters and buffers that rank 0 has."""
    from torch.distributed.utils import _sync_module_states

    group: Any = dist.group.WORLD
    _sync_module_states(model, group, _BROADCAST_BYTES, src=0, params_and_buffers_to_ignore=[])


def broadcast_tensors(tensors: Sequence[Tensor], *, source: int = 0) -> None:
    """Give every rank the values that tensors have on one rank, many of them in one message.

    Args:
        tensors: without a graph; overwritten in place.
        source: rank whose values they become.
    """
    if tensors:
        group = dist.distributed_c10d._get_default_group()
        dist._broadcast_coalesced(group, list(tensors), _BROADCAST_BYTES, source)


def find_on_rank_0(find: Callable[[], T], *, within: AbstractContextManager[None] | None = None) -> T:
    """Return on every rank what ``find`` returns on rank 0; if it fails there, its error is raised on all.

    Args:
        find: is called on rank 0.
        within: what the broadcast runs in.
    """
    if world_size() == 1:
        return find()
    result_and_error: list[Any] = [None, None]
    failed: Exception | None = None
    if rank() == 0:
        try:
            result_and_error[0] = find()
        except Exception as error:  # noqa: BLE001 - it is raised on every rank
            failed = error
            result_and_error[1] = _sendable(error)
    with within or nullcontext():
        dist.broadcast_object_list(result_and_error, src=0)
    if failed is not None:
        raise failed
    found, told = result_and_error
    if told is not None:
        raise told
    result: T = found
    return result


def _sendable(error: Exception) -> Exception:
    """Return the error, or where another process cannot make the same, one that says what it says."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - it was made here
    except Exception:  # noqa: BLE001 - the user's classes may raise anything
        return EffError(f"rank 0 raised {type(error).__name__}: {error}")
    return error


def gather_on_rank_0(value: T) -> list[T] | None:
    """Return every rank's value, by rank, on rank 0; None elsewhere."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values
