"""What a checkpoint holds of a method is looked at before it is used: taken as a whole, or refused by name.

Every key of a real state (``tests/data``) is damaged in some twenty ways. What comes of it is a CheckpointError that
leaves everything as it was, or one of the few things :data:`TAKEN` documents.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch

from lightning_eff.errors import CheckpointError
from tests.state.states import every_run, loader_of, same, state_of

DELETE = object()
DAMAGE: dict[str, Any] = {
    "delete": DELETE, "none": None, "text": "banana", "number as text": "7", "bytes": b"7", "true": True, "minus 1": -1,
    "minus half": -0.5, "half": 0.5, "nan": math.nan, "inf": math.inf, "huge": 10**400, "long": 2**70, "empty list": [],
    "empty mapping": {}, "wrapped": "WRAP", "list of text": ["a", "b"], "mapping": {"a": 1}, "number": 7, "set": {1},
    "0-d tensor": torch.tensor(1.0), "tensor": torch.ones(2), "nan tensor": torch.full((2,), math.nan), "object": print,
}  # fmt: skip

TAKEN: dict[str, list[str]] = {
    # an entry less: layers and parameters that are not remembered begin anew (a run warns); a plain optimizer's state
    "delete": [
        "memory/net.*", "memory/net.?/*", "scales/*", "history/0", "ranks/0/net.0", "layers/net.0",
        "fp8-delayed/memory", "measured", "bf16", "state/0/*", "start_lrs/0", "layers/0", "versions/*",
        "versions/*/0", "previous/0",
    ],
    "empty mapping": ["memory", "memory/net.?", "scales", "ranks/0", "gradient_*/layers", "versions"],
    "mapping": ["scales"],
    "empty list": ["flexpoint16/memory/*/*/history", "weights/memory/*/history", "start_lrs", "versions/*", "previous"],
    "none": ["measured", "fp6-fit/seed", "previous"],
    "true": ["measured", "fitted", "initialised"],
    # other names: the pipeline finds other layers, and says that its delays begin anew
    "text": ["pipelined_bp/layers/0"],
    "number as text": ["pipelined_bp/layers/0"],
    # tensors of other shapes are refused with the first batch, when it is known what the stages hold
    "0-d tensor": ["versions/*/0", "previous/0"],
    "tensor": ["versions/*/0", "previous/0"],
    # numbers in range
    "nan": ["luq4/*/*/*/value", "threshold", "sigma"],
    "inf": ["threshold_s"],
    "minus 1": ["bias", "correction"],
    "minus half": ["correction"],
    "number": [
        "seed", "luq4/calls", "fp8-fit/calls", "flexpoint16/calls", "0/*/calls", "steps", "computed", "dropped",
        "samples", "in_flight", "start_step", "overflows", "next_fit", "fits", "bias", "correction", "threshold",
        "threshold_s", "sigma", "sigma_log2", "value", "max_abs", "history/0", "*_lrs/0", "skipped",
    ],
    "half": [
        "scale", "scales/*", "correction", "threshold", "threshold_s", "sigma", "sigma_log2", "zeros", "value",
        "max_abs", "history/0", "*_lrs/0",
    ],
    "long": [
        "scale", "scales/*", "threshold", "threshold_s", "sigma", "sigma_log2", "value", "max_abs", "history/0",
        "*_lrs/0",
    ],
}  # fmt: skip
"""Damage -> where it leaves a state that a run can be in; everywhere else it is a CheckpointError."""


def places(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to everything in a state; of entries that are alike the first one."""
    if path:
        yield path
    if isinstance(state, dict):
        alike = len({str(type(value)) for value in state.values()}) == 1 and len(state) > 2 and path
        for key in list(state)[: 1 if alike else None]:
            yield from places(state[key], (*path, key))
    elif isinstance(state, list) and state:
        yield from places(state[0], (*path, 0))


def damaged(state: Any, path: tuple[Any, ...], damage: Any) -> Any:
    """A copy of the state with one thing in it damaged."""
    copied = copy.deepcopy(state)
    parent = copied
    for key in path[:-1]:
        parent = parent[key]
    if damage is DELETE:
        del parent[path[-1]]
    else:
        parent[path[-1]] = [parent[path[-1]]] if isinstance(damage, str) and damage == "WRAP" else damage
    return copied


def is_ours(name: str, path: tuple[Any, ...]) -> bool:
    """Of an optimizer's state torch looks after its own part."""
    return not name.startswith("bf16") or "bf16" in path or path[-1] in {"lo", "compensation"}


@every_run
@pytest.mark.filterwarnings("ignore::lightning_eff.errors.EffWarning")
def test_each_damage_is_refused_or_documented_and_nothing_is_half_loaded(name: str) -> None:
    state, tried = state_of(name), 0
    for path in filter(lambda path: is_ours(name, path), places(state)):
        where = PurePosixPath(name, *map(str, path))
        for damage, value in DAMAGE.items():
            load, tell = loader_of(name)
            load(copy.deepcopy(state))
            before, tried = tell(), tried + 1
            taken = any(where.match(pattern) for pattern in TAKEN.get(damage, []))
            told = ""
            try:
                load(damaged(state, path, value))
            except CheckpointError as error:
                told = str(error)
            assert taken == (not told), f"{where}, {damage}: {told or 'was taken'}"
            assert taken or same(before, tell()), f"{where}, {damage} was half loaded"
            assert len(told) < 900
    assert tried >= len(DAMAGE)


@every_run
@pytest.mark.parametrize("state", [None, "abc", b"abc", 3, [], {1: 2}, torch.ones(2), {}, [{}]], ids=repr)
def test_what_is_no_state_at_all_is_refused(name: str, state: Any) -> None:
    load, tell = loader_of(name)
    before = tell()
    with pytest.raises(CheckpointError, match="state"):
        load(copy.deepcopy(state))
    assert same(before, tell())
