"""Stacks of small layers, and models around them."""

from __future__ import annotations

from torch import nn

W = 4


def linears(count: int) -> list[nn.Module]:
    return [nn.Linear(W, W) for _ in range(count)]


def model(**children: nn.Module) -> nn.Module:
    made = nn.Module()
    for name, child in children.items():
        made.add_module(name, child)
    return made
