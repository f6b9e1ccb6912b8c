"""What the ranks of a pipeline hold between them is brought together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_eff.strategies.pipelined_bp.consolidate import Consolidation
from lightning_eff.strategies.pipelined_bp.partition import Partition
from tests.harness import run_ranks


class Replaces(nn.Module):
    """Puts another tensor in the place of a buffer, as running averages are often written."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("average", torch.zeros(2))

    def step(self, value: float) -> None:
        self.average = 0 * self.average + value
        with torch.no_grad():
            self.linear.weight.fill_(value)


def _bring_together(rank: int, world: int) -> Any:
    model = nn.ModuleList([Replaces(), Replaces()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        optimizer.state[p] = {"momentum_buffer": torch.full_like(p, float(rank))}
    owners = {name: int(name[0]) for name, _ in model.named_parameters()}
    partition = Partition((0, 1), (0, 1), owners, {f"{i}.average": i for i in range(2)})
    consolidation = Consolidation(model, optimizer, partition, position=1 - rank)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4], "nothing is changed until asked for"
    consolidation.keep_own_parameters()
    trains = [len(group["params"]) for group in optimizer.param_groups]
    for module in model:
        module.step(rank + 1.0)
    consolidation.broadcast_weights()
    values = [(float(m.linear.weight.mean()), float(m.average.mean())) for m in model]
    state = consolidation.gather_optimizer_state(optimizer.state_dict())
    moments = {i: float(s["momentum_buffer"].mean()) for i, s in state["state"].items()}
    return trains, values, moments, state["param_groups"][0]["params"]


def test_what_ranks_hold_between_them_is_brought_together() -> None:
    """Stage 0 is trained on rank 1, which has made its weights and buffers 2; stage 1 on rank 0."""
    first, second = run_ranks(_bring_together, 2)
    for trains, values, _, _ in (first, second):
        assert trains == [2]
        assert values == [(2.0, 2.0), (1.0, 1.0)]
    assert first[2:] == ({0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0}, [0, 1, 2, 3])
