"""The noise of stochastic rounding: a hash of the run's seed, the step, and what identifies a parameter."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_eff.functional.random import GOLDEN64, mix64


def stream_of(name: str) -> int:
    """Return the number of the random stream of the parameter called ``name``: the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1  # fits int64


def noise_seed(seed: int, step: int, stream: int) -> int:
    """Return a 64-bit seed for each step and stream (splitmix64, twice)."""
    for number in (step + 1, stream + 1):
        seed = mix64(seed + number * GOLDEN64)
    return seed


class Streams(dict[Tensor, int]):
    """Parameter -> the number of its random stream: a hash of its name, or its place when it takes its first step."""

    def name(self, groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str]) -> None:
        """Give the parameters that have no number yet the names in ``names``, or those the optimizer knows."""
        for group in groups:
            for p, own in zip(group["params"], group.get("param_names", itertools.repeat(None)), strict=False):
                name = names.get(p, own)
                if name is not None and p not in self:
                    self[p] = stream_of(name)

    def of(self, every: Sequence[Tensor]) -> list[int]:
        """Return the numbers of all parameters; whoever has none gets its place, or the next number that is free."""
        taken = set(self.values())
        for place, p in enumerate(every):
            if p not in self:
                self[p] = next(number for number in itertools.count(place) if number not in taken)
                taken.add(self[p])
        return [self[p] for p in every]

    def load(self, every: Sequence[Tensor], saved: Sequence[int] | None) -> None:
        """Go on with the numbers :meth:`of` gave; states saved without identified parameters by their place."""
        numbers = range(len(every)) if saved is None else saved
        self.clear()
        self.update(zip(every, numbers, strict=True))
