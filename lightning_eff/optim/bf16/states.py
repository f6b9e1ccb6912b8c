"""The states an optimizer has when it is made to update in float32: those its constructor made, widened."""

from __future__ import annotations

import inspect
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def widen_states(optimizer: Optimizer, original: type[Optimizer]) -> None:
    """Make float32 of the states there are already: Adagrad makes its own when it is constructed."""
    found = {p: s for p, s in optimizer.state.items() if isinstance(p, Tensor) and any(map(_is_half, s.values()))}
    first = _first_states(optimizer, original, found) if found else {}
    for p, state in found.items():
        for key, value in state.items():
            if _is_half(value):
                exact = first[p].get(key) if p in first else None
                same = isinstance(exact, Tensor) and torch.equal(exact.to(torch.bfloat16), value)
                state[key] = exact if same else value.to(torch.float32)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.bfloat16


def _first_states(
    optimizer: Optimizer, original: type[Optimizer], wanted: Container[Tensor]
) -> dict[Tensor, dict[str, Any]]:
    """The states this optimizer would have begun with, had its parameters been float32: 0.1 is no bfloat16 number.

    Made by constructing it again, with the options it keeps. Empty where its constructor needs others.
    """
    options = inspect.signature(original.__init__).parameters
    given = {name: value for name, value in optimizer.defaults.items() if name in options}
    needed = list(options.values())[2:]  # after self and the parameters
    if any(o.default is o.empty and o.kind is o.POSITIONAL_OR_KEYWORD and o.name not in given for o in needed):
        return {}
    stand_ins: dict[Tensor, Tensor] = {}
    groups = []
    for group in optimizer.param_groups:
        own = {p: nn.Parameter(p.detach().to(torch.float32)) for p in group["params"] if p in wanted}
        stand_ins |= own
        groups.append({**group, "params": list(own.values())})
    again = original([group for group in groups if group["params"]], **given)
    return {p: again.state[stand_in] for p, stand_in in stand_ins.items()}
