"""What the processes of a pipeline hold between them, brought together: weights, optimizer state, figures."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from lightning_eff.errors import EffError
from lightning_eff.runtime.ranks import rank, world_size
from lightning_eff.strategies.pipelined_bp.partition import Cut

_BUCKET = 250 << 20
T = TypeVar("T")


def same_weights(model: nn.Module) -> None:
    """Give every rank the weights of rank 0."""
    from torch.distributed.utils import _sync_module_states

    group: Any = dist.group.WORLD
    _sync_module_states(model, group, _BUCKET, src=0, params_and_buffers_to_ignore=[])


def told_by_rank_0(find: Callable[[], T], within: AbstractContextManager[None] | None = None) -> T:
    """What rank 0 finds; if it fails, all fail with its error.

    Args:
        find: is called on rank 0.
        within: what the broadcast runs in.
    """
    if world_size() == 1:
        return find()
    told: list[Any] = [None, None]
    failed: Exception | None = None
    if rank() == 0:
        try:
            told[0] = find()
        except Exception as error:  # noqa: BLE001 - it is raised on every rank
            failed = error
            told[1] = _sendable(error)
    with within or nullcontext():
        dist.broadcast_object_list(told, src=0)
    if failed is not None:
        raise failed
    if told[1] is not None:
        raise told[1]
    return told[0]


def _sendable(error: Exception) -> Exception:
    """The error, or where another process cannot make the same, one that says what it says."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - it was made here
    except Exception:  # noqa: BLE001 - the user's classes may raise anything
        return EffError(f"rank 0 raised {type(error).__name__}: {error}")
    return error


class Gathered:
    """A model and its optimizer of which every position of the pipeline trains a part.

    Made, it leaves in the optimizer what this rank trains, in place: schedulers go on to hold it.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, found: Cut, position: int) -> None:
        self._optimizer, self._positions = optimizer, len(found.ranks_start)
        rank_of = {s: self._positions - 1 - found.position_of(s) for s in range(found.stages)}
        self._weights: dict[int, list[torch.Tensor]] = {rank: [] for rank in range(self._positions)}
        for name, p in model.named_parameters():
            self._weights[rank_of[found.owners[name]]].append(p)
        self._buffers: dict[int, list[tuple[nn.Module, str]]] = {rank: [] for rank in range(self._positions)}
        for name, _ in model.named_buffers():  # looked up when needed: a module may put another tensor in its place
            owner, _, key = name.rpartition(".")
            self._buffers[rank_of[found.buffer_owners[name]]].append((model.get_submodule(owner), key))
        mine = {id(t) for t in self._weights[self._positions - 1 - position]}
        self._whole = [list(group["params"]) for group in optimizer.param_groups]
        if self._positions > 1:
            for group in optimizer.param_groups:
                group["params"][:] = [p for p in group["params"] if id(p) in mine]
            for foreign in [p for p in optimizer.state if id(p) not in mine]:
                del optimizer.state[foreign]

    def give_back(self) -> None:
        """Put all parameters into the optimizer again: it may be used for another run."""
        for group, whole in zip(self._optimizer.param_groups, self._whole, strict=False):  # groups may have been added
            group["params"][:] = whole

    @torch.no_grad()
    def weights(self) -> None:
        """Give every rank the weights and buffers of their owners."""
        group = dist.distributed_c10d._get_default_group()
        for source, tensors in self._weights.items():
            buffers = [getattr(module, key) for module, key in self._buffers[source]]
            if data := [t.detach() for t in (*tensors, *buffers)]:
                dist._broadcast_coalesced(group, data, _BUCKET, source)

    def optimizer_state(self, ours: dict[str, Any]) -> dict[str, Any]:
        """The state of the whole optimizer on rank 0, from every rank's; elsewhere what it was."""
        if self._positions == 1:
            return ours
        index = {id(p): i for i, p in enumerate(p for group in self._whole for p in group)}
        mine = {index[id(p)]: state for p, state in self._optimizer.state.items()}
        places = [index[id(p)] for group in self._optimizer.param_groups for p in group["params"]]
        streams = dict(zip(places, ours.get("bf16", {}).get("streams", ()), strict=False))
        parts: list[Any] | None = [None] * self._positions if rank() == 0 else None
        dist.gather_object((mine, streams), parts)
        if parts is None:
            return ours
        first = 0
        for group, whole in zip(ours["param_groups"], self._whole, strict=True):
            group["params"] = list(range(first, first + len(whole)))
            first += len(whole)
        found = {**ours, "state": {i: state for part, _ in parts for i, state in part.items()}}
        if streams:  # of bf16-sr: every parameter rounds as it would in one process
            every = {i: stream for _, part in parts for i, stream in part.items()}
            found["bf16"] = {**ours["bf16"], "streams": [every[i] for i in sorted(every)]}
        return found


def collected(value: T) -> list[T] | None:
    """Every rank's value, by rank, on rank 0; None elsewhere."""
    if world_size() == 1:
        return [value]
    parts: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, parts)
    return parts


def metrics_of_rank_0(trainer: Any) -> None:
    """Give every rank what rank 0 has logged, for callbacks that decide by it."""
    metrics = [{k: v.detach().cpu() if hasattr(v, "detach") else v for k, v in trainer.callback_metrics.items()}]
    dist.broadcast_object_list(metrics, src=0)
    if rank() != 0:
        trainer._logger_connector._callback_metrics.update(metrics[0])
