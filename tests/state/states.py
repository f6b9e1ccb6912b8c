"""The states of the files in ``tests/data``, what loads them into new objects, and when two states are the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff.optim import bf16_updates
from tests.state.runs import DATA, RUNS

every_run = pytest.mark.parametrize("name", RUNS)


def state_of(name: str) -> Any:
    """What the file of a method holds of it."""
    found = torch.load(DATA / f"{name}.ckpt", weights_only=True)
    for key in RUNS[name].path:
        found = found[key]
    return found


def loader_of(name: str) -> tuple[Callable[[Any], None], Callable[[], Any]]:
    """What loads a state into a new object of the method, and what tells the state of that object."""
    if name.startswith("bf16"):
        shapes = [group.shape for group in _parameters()]
        weights = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]
        kind = torch.optim.Adam if RUNS[name].optimizer == "adam" else torch.optim.SGD
        optimizer = bf16_updates(kind(weights, lr=0.01), update=name.removeprefix("bf16-"))  # type: ignore[arg-type]
        return optimizer.load_state_dict, lambda: copy.deepcopy(optimizer.state_dict())
    options = RUNS[name].options()
    if "strategy" in options:
        strategy, key = options["strategy"], RUNS[name].path[0]
        strategy._trainer = SimpleNamespace(global_step=0, max_steps=-1)
        names = ("_steps", "_tallies", "_search", "_saved")
        return (
            lambda state: strategy.load_optimizer_state_dict({key: state, "optimizer_states": []}),
            lambda: copy.deepcopy({name: getattr(strategy, name, None) for name in names}),
        )
    made = (options.get("plugins") or options["callbacks"])[0]
    return made.load_state_dict, lambda: copy.deepcopy(made.state_dict())


def _parameters() -> list[torch.Tensor]:
    return list(torch.load(DATA / "bf16-split.ckpt", weights_only=True)["state_dict"].values())


def same(a: Any, b: Any) -> bool:
    """Equal, also where there are tensors and NaN."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype is b.dtype and torch.equal(a, b)
    return bool(a == b) or (a != a and b != b)  # noqa: PLR0124 - NaN


def given_back(state: Any, found: Any) -> bool:
    """Whether all that was in a state is in what is saved again, which may have more: what older versions left out."""
    if isinstance(state, dict):
        return all(key in found and (key == "param_groups" or given_back(state[key], found[key])) for key in state)
    return same(state, found)
