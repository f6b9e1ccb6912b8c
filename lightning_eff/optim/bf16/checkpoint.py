"""What :func:`~lightning_eff.optim.bf16_updates` adds to an optimizer's state, looked at before it is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_eff.checks import NotAllowedError, Place
from lightning_eff.errors import EffWarning
from lightning_eff.methods.state import UPDATES, TensorOf, damaged, read_state
from lightning_eff.optim.bf16.kept import KEPT

SCALARS = "bf16"
"""Key of the optimizer's ``state_dict`` with the update, the seed and the number of steps."""
_REMOVE = f"[state.pop({SCALARS!r}, None) for state in checkpoint['optimizer_states']]"


def read_updates(state: Any, every: Sequence[Tensor], update: str) -> dict[str, Any] | None:
    """Return the numbers under ``bf16``, or None in the state of a plain optimizer; nothing is changed.

    Args:
        state: what ``load_state_dict`` was given.
        every: the parameters of the optimizer it is for.
        update: of that optimizer.

    Raises:
        CheckpointError: a number, a dtype or a shape is not what this module writes.
    """
    whole = isinstance(state, Mapping) and isinstance(state.get("state"), Mapping)
    if not whole or not _are_groups(state.get("param_groups")):
        raise damaged(
            f"bf16-{update}", "it is no state_dict of an optimizer.", remove="checkpoint['optimizer_states'] = []"
        )
    numbers = None
    if SCALARS in state:
        numbers = read_state(UPDATES, state[SCALARS], of=f"bf16-{update}", remove=_REMOVE)
    if numbers is not None and numbers["streams"] is not None and len(numbers["streams"]) != len(every):
        wrong = f"{SCALARS!r} has {len(numbers['streams'])} streams of random numbers for {len(every)} parameters."
        raise damaged(f"bf16-{update}", wrong, remove=_REMOVE)
    for key, dtype in KEPT.values():
        for index, own in state["state"].items():
            if isinstance(own, Mapping) and key in own:
                _check_kept(own[key], every, index, key, dtype, update)
    if numbers is not None and numbers["update"] == update and numbers["steps"]:
        _warn_of_missing(state["state"], every, update)
    return numbers


def _are_groups(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in given)


def _check_kept(kept: Any, every: Sequence[Tensor], index: Any, key: str, dtype: torch.dtype, update: str) -> None:
    where = f"state[{index!r}][{key!r}]"
    rule = TensorOf(str(dtype).removeprefix("torch."))
    remove = f"[own.pop({key!r}, None) for state in checkpoint['optimizer_states'] for own in state['state'].values()]"
    try:
        rule.read(kept, Place(where))
    except NotAllowedError as error:
        raise damaged(f"bf16-{update}", error, remove=remove) from None
    if isinstance(index, int) and index < len(every) and kept.shape != every[index].shape:
        shapes = f"{tuple(kept.shape)} for a parameter of shape {tuple(every[index].shape)}"
        raise damaged(f"bf16-{update}", f"{where} has the shape {shapes}.", remove=remove)


def _warn_of_missing(states: Mapping[Any, Any], every: Sequence[Tensor], update: str) -> None:
    """A parameter that has been updated has what is kept for it, or its first step will not be exact."""
    if update not in KEPT:
        return
    key, _ = KEPT[update]
    missing = [
        index
        for index, own in states.items()
        if isinstance(index, int)
        and index < len(every)
        and every[index].dtype is torch.bfloat16
        and isinstance(own, Mapping)
        and own
        and key not in own
        and own.get("step", 1) != 0  # Adagrad has a state before the first gradient
    ]
    if missing:
        warnings.warn(
            f"bf16-{update}: the checkpoint lacks {key!r} of the parameters {missing[:8]}; it begins with zeros, and "
            "the resume is not exact.",
            EffWarning,
            stacklevel=4,
        )
