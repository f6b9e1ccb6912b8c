"""The whole model and the whole optimizer, brought together from the parts that the ranks of a pipeline train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_eff.runtime.ranks import broadcast_tensors, gather_on_rank_0
from lightning_eff.strategies.pipelined_bp.partition import Partition

__all__ = ["Consolidation"]


class Consolidation:
    """Brings together a model and its optimizer, of which every position of the pipeline trains a part.

    Args:
        model: the whole model.
        optimizer: of all its parameters.
        partition: of the model into stages.
        position: of this rank in the pipeline.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, partition: Partition, *, position: int
    ) -> None:
        self._optimizer = optimizer
        self._positions = len(partition.ranks_start)
        rank_of = {s: self._positions - 1 - partition.position_of(s) for s in range(partition.stages)}
        self._weights: dict[int, list[torch.Tensor]] = {rank: [] for rank in range(self._positions)}
        for name, p in model.named_parameters():
            self._weights[rank_of[partition.owners[name]]].append(p)
        self._buffers: dict[int, list[tuple[nn.Module, str]]] = {rank: [] for rank in range(self._positions)}
        for name, _ in model.named_buffers():  # looked up when needed: a module may put another tensor in its place
            owner, _, key = name.rpartition(".")
            self._buffers[rank_of[partition.buffer_owners[name]]].append((model.get_submodule(owner), key))
        self._own = {id(t) for t in self._weights[self._positions - 1 - position]}
        self._whole = [list(group["params"]) for group in optimizer.param_groups]

    def keep_own_parameters(self) -> None:
        """Leave in the optimizer what this rank trains, in place: schedulers go on to hold it."""
        if self._positions == 1:
            return
        for group in self._optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if id(p) in self._own]
        for foreign in [p for p in self._optimizer.state if id(p) not in self._own]:
            del self._optimizer.state[foreign]

    def restore_optimizer(self) -> None:
        """Put all parameters into the optimizer again: it may be used for another run."""
        for group, whole in zip(self._optimizer.param_groups, self._whole, strict=False):  # groups may have been added
            group["params"][:] = whole

    @torch.no_grad()
    def broadcast_weights(self) -> None:
        """Give every rank the weights and buffers of their owners."""
        for source, tensors in self._weights.items():
            buffers = [getattr(module, key) for module, key in self._buffers[source]]
            broadcast_tensors([t.detach() for t in (*tensors, *buffers)], source=source)

    def gather_optimizer_state(self, ours: dict[str, Any]) -> dict[str, Any]:
        """Return the state of the whole optimizer on rank 0, from every rank's; elsewhere what it was.

        Args:
            ours: ``state_dict()`` of this rank's optimizer.
        """
        if self._positions == 1:
            return ours
        index = {id(p): i for i, p in enumerate(p for group in self._whole for p in group)}
        mine = {index[id(p)]: state for p, state in self._optimizer.state.items()}
        places = [index[id(p)] for group in self._optimizer.param_groups for p in group["params"]]
        streams = dict(zip(places, ours.get("bf16", {}).get("streams", ()), strict=False))
        parts = gather_on_rank_0((mine, streams))
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
