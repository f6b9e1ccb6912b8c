"""Other tensors stand for an optimizer's parameters while its own code runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


@contextlib.contextmanager
def exchanged(optimizer: Optimizer, places: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Let ``places[p]`` stand for ``p`` in the parameter groups and in the state; hide what is not in it."""
    lists = [(group["params"], list(group["params"])) for group in optimizer.param_groups]
    for params, originals in lists:
        params[:] = [places[p] for p in originals if p in places]
    _rename(optimizer.state, places)
    try:
        yield
    finally:
        for params, originals in lists:
            params[:] = originals
        _rename(optimizer.state, {stand_in: p for p, stand_in in places.items()})


def _rename(states: Any, names: Mapping[Any, Any]) -> None:
    for old, new in names.items():
        if old in states and (state := states.pop(old)):
            states[new] = state
