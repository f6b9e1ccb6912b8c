"""What one run's bfloat16 optimizers leave to those of the run that goes on with it.

Lightning makes new optimizers for every fit. Momenta are lost with the old ones, as always; the lower halves of weights
are not an optimizer's to lose: without them the weights would be cut to bfloat16 between two fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_eff.optim.bf16.kept import KEPT
from lightning_eff.optim.bf16.wrapper import ShadowedOptimizer

Left = tuple[list[Any], dict[int, tuple[Tensor, dict[str, Tensor]]]]
"""Each optimizer's scalars, and for each parameter (by its id) what was kept for it."""


def versions(optimizers: Iterable[Optimizer]) -> dict[int, int]:
    """Return how often each parameter has been written to; another number later means that somebody else has."""
    return {id(p): p._version for p in _parameters(optimizers)}


def left_by(optimizers: Sequence[Optimizer], unchanged: Mapping[int, int]) -> Left:
    """Return what the optimizers keep for the parameters whose version is still that in ``unchanged``."""
    ours = [optimizer for optimizer in optimizers if isinstance(optimizer, ShadowedOptimizer)]
    kept = {}
    for optimizer in ours:
        for p in _parameters([optimizer]):
            state = optimizer.state.get(p, {})
            if unchanged.get(id(p)) == p._version:
                kept[id(p)] = p, {key: state[key] for key, _ in KEPT.values() if key in state}
    return [dict(optimizer.bf16_numbers) for optimizer in ours], kept


def hand_over(left: Left, optimizers: Sequence[Optimizer]) -> list[Any]:
    """Give it to the new optimizers, in the same order, for the same parameters; return the scalars they had."""
    scalars, kept = left
    new = [dict(optimizer.bf16_numbers) for optimizer in optimizers if isinstance(optimizer, ShadowedOptimizer)]
    for optimizer, old in zip(optimizers, scalars, strict=False):
        if isinstance(optimizer, ShadowedOptimizer) and old["update"] == optimizer.update:
            optimizer.bf16_numbers.update(old)
            for p in _parameters([optimizer]):
                if id(p) in kept and p not in optimizer.state:
                    optimizer.state[p] = dict(kept[id(p)][1])
    return new


def take_back(new: Sequence[Any], optimizers: Sequence[Optimizer]) -> None:
    """Give the optimizers their own scalars again; what was kept goes when a checkpoint's state is loaded."""
    for optimizer, own in zip(optimizers, new, strict=False):
        if isinstance(optimizer, ShadowedOptimizer):
            optimizer.bf16_numbers.update(own)


def _parameters(optimizers: Iterable[Optimizer]) -> Iterable[Tensor]:
    return (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
