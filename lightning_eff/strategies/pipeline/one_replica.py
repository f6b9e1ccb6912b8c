"""A strategy of several processes that hold one model between them: for Lightning and the user there is one replica."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class OneReplica:
    """World size 1 for whoever asks: the same batches everywhere, nothing to reduce; barriers and broadcasts real."""

    @property
    def world_size(self) -> int:
        """Data-parallel replicas."""
        return 1

    @property
    def is_distributed(self) -> bool:
        """Whether Lightning should share samples out: no, and so the user's own sampler stays."""
        return False

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """For whoever builds a sampler nevertheless."""
        return {"num_replicas": 1, "rank": 0}

    def reduce(self, tensor: Any, *_: Any, **__: Any) -> Any:
        """The value itself: there is one."""
        return tensor

    def all_gather(self, tensor: Any, *_: Any, **__: Any) -> Any:
        """The value itself, as without a process group."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002 - Lightning's name
        """Whether all processes, or any, say so."""
        if not (dist.is_available() and dist.is_initialized()):
            return decision
        votes = torch.tensor(int(decision), device=self.root_device)  # type: ignore[attr-defined]
        with self._meeting("a decision"):  # type: ignore[attr-defined]
            dist.all_reduce(votes)
        return int(votes) == dist.get_world_size() if all else bool(votes)
