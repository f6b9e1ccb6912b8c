"""The arithmetic of the reports: ratios of interleaved timings, and their spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Spread", "ratio", "spread"]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of a few repetitions."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}..{self.high:.3g}]"


def spread(values: Sequence[float]) -> Spread:
    """Return median, minimum and maximum.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.0, high=3.0)
    """
    return Spread(statistics.median(values), min(values), max(values))


def ratio(ours: Sequence[float], base: Sequence[float]) -> Spread:
    """Return the spread of the per-round ratio ``ours[r] / base[r]``.

    Rounds are compared with themselves, so that a slow minute of the machine slows both sides of a ratio.

    Example:
        >>> ratio([1.0, 3.0, 2.0], [2.0, 4.0, 2.0])
        Spread(median=0.75, low=0.5, high=1.0)
    """
    return spread([a / b for a, b in zip(ours, base, strict=True)])
