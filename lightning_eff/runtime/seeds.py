"""Seeds of rounding and sampling that leave torch's generators alone."""

from __future__ import annotations

import torch

from lightning_eff.functional.random import GOLDEN64, MASK64, mix64, rank_seed

__all__ = ["SeedStream"]


class SeedStream:
    """Gives the seeds of the gradient rounding: a counter hashed with the run's seed; two integers resume it exactly.

    It starts from ``torch.initial_seed()`` at first use, without drawing: the user's dropout masks and shuffles are
    those of the run without the method.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.calls = 0

    def next(self, *, same_on_ranks: bool = False) -> int:
        """Return the next 64-bit seed (splitmix64 of the counter), another on every rank unless asked for."""
        if self.seed is None:
            self.seed = torch.initial_seed() & MASK64
        self.calls += 1
        z = mix64(self.seed + self.calls * GOLDEN64)
        return z if same_on_ranks else rank_seed(z)
