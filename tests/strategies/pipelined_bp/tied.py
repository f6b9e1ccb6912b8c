"""A model around a stack, with ties between its parts and with what leaves traces."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_eff.strategies.pipelined_bp.profiling import Profile, profile_stack
from lightning_eff.strategies.pipelined_bp.stack import Stack, find_stack
from tests.strategies.pipelined_bp.stacks import W, linears

CPU = torch.device("cpu")


class Tied(nn.Module):
    """``pre``, a stack, ``post``; with what leaves traces, and ``tie`` between two of its parts."""

    def __init__(self, tie: str = "", layers: int = 4) -> None:
        super().__init__()
        self.tie, self.pre, self.post = tie, nn.Linear(W, W), nn.Linear(W, W)
        self.net = nn.Sequential(*linears(layers))
        self.idle, self.frozen = nn.Linear(W, W), nn.Linear(W, W).requires_grad_(False)
        if tie == "around":
            self.post.weight = self.pre.weight
        if tie == "inside":
            self.net[2].weight = self.net[1].weight
        if tie == "pre":
            self.net[1].weight = self.pre.weight
        self.batch = torch.randn(3, W)

    def step(self) -> Any:
        h = self.pre(self.batch)
        out = self.post(self.net(h)) + (h if self.tie == "skip" else 0)
        return {"loss": out.square().mean()}


def profiled(tied: Tied) -> tuple[Stack, Profile]:
    stack = find_stack(tied, "net")
    return stack, profile_stack(tied, stack, tied.step, CPU)
