"""A strategy of several processes that hold one model between them: for Lightning and the user there is one replica."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from lightning_eff.integration.rank_faults import RankFaults
from lightning_eff.runtime.ranks import has_group

__all__ = ["OneReplica"]


class OneReplica(RankFaults):
    """Reports a world of size 1: the same batches everywhere, nothing to reduce; barriers and broadcasts are real."""

    stages: int | str | Sequence[str] | None

    @property
    def positions(self) -> int:
        """P, processes the model is spread over."""
        return int(self.num_processes * self.num_nodes)

    @property
    def num_stages(self) -> int | str | Sequence[str]:
        """What ``stages`` asks for: a number, "layers" or names."""
        return self.positions if self.stages is None or self.stages == "auto" else self.stages

    @property
    def _pipelines(self) -> bool:
        return bool(self.num_stages != 1)

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
        """Arguments for whoever builds a sampler nevertheless."""
        return {"num_replicas": 1, "rank": 0}

    def reduce(self, tensor: Any, *_: Any, **__: Any) -> Any:
        """Return the value itself: there is one replica."""
        return tensor

    def all_gather(self, tensor: Any, *_: Any, **__: Any) -> Any:
        """Return the value itself, as without a process group."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002 - Lightning's name
        """Return whether all processes, or any, say so."""
        if not has_group():
            return decision
        votes = torch.tensor(int(decision), dtype=torch.int64, device=self.root_device)
        with self.naming_lost_ranks("a decision"):
            dist.all_reduce(votes)
        return int(votes) == dist.get_world_size() if all else bool(votes)
