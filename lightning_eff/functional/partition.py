"""Cut a sequence of items into contiguous groups so that the most expensive group costs as little as possible.

For layers on pipeline stages the most expensive stage sets the pace of all. The answer is exact: costs are taken as
the whole numbers they are in binary, a bisection finds the least possible largest sum, and of all partitions that reach
it dynamic programming takes the one whose groups have the most equal numbers of items (least sum of their squares).

Legend: n items with costs c_0 .. c_{n-1}, P ``parts``; a *cut* at i begins a group with item i.

References:
    Linear partition problem; Skiena, The Algorithm Design Manual, 3rd ed. 2020, section 10.7 (from memory).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from lightning_eff.checks import Whole, check
from lightning_eff.errors import ConfigurationError


def balance(costs: Sequence[float], parts: int, *, together: Sequence[tuple[int, int]] = ()) -> list[int]:
    """Return the index of the first item of every group, where the largest sum of a group is as small as possible.

    Args:
        costs: c of every item in order; finite, not negative.
        parts: P, the number of groups; none is empty.
        together: inclusive ranges (i, j) of items that must be in one group; they may overlap.

    Returns:
        P indices, ascending, the first 0. The same for the same arguments, always.

    Raises:
        ConfigurationError: there are no ``parts`` such groups, or a cost or a range is not allowed.

    Example:
        >>> balance([1, 1, 1, 3], 2)
        [0, 3]
        >>> balance([1, 1, 1, 3], 2, together=[(2, 3)])
        [0, 2]
    """
    cuts = _allowed_cuts(len(costs), parts, together)
    # A float is a whole number of 2^-k: sums are exact and equal ones are equal.
    ends = [0, *accumulate(_whole(costs))]
    limit = _least_limit(ends, cuts, parts)
    return _most_equal(ends, cuts, parts, limit)


def _allowed_cuts(num_items: int, parts: int, together: Sequence[tuple[int, int]]) -> list[int]:
    """Where a group may begin or end: 0, the allowed cuts, n."""
    parts = check("parts", parts, Whole(1))
    if parts > num_items:
        raise ConfigurationError(f"parts={parts!r} is not allowed for {num_items} items; no group may be empty.")
    for first, last in together:
        if not 0 <= first <= last < num_items:
            raise ConfigurationError(
                f"together has the range ({first}, {last}); a range is (first, last), both from 0 to {num_items - 1}."
            )
    inside = {cut for first, last in together for cut in range(first + 1, last + 1)}
    cuts = [cut for cut in range(num_items + 1) if cut not in inside]
    if len(cuts) - 1 < parts:
        raise ConfigurationError(
            f"parts={parts!r} is not allowed: with together={list(together)!r} the {num_items} items can be cut into "
            f"{len(cuts) - 1} groups at most."
        )
    return cuts


def _whole(costs: Sequence[float]) -> list[int]:
    """The costs times the least power of 2 that makes all of them whole."""
    for item, cost in enumerate(costs):
        if not (cost >= 0 and math.isfinite(cost)):
            raise ConfigurationError(f"The cost of item {item} is {cost!r}; costs are finite and not negative.")
    ratios = [float(cost).as_integer_ratio() for cost in costs]
    scale = max(denominator for _, denominator in ratios)
    return [numerator * (scale // denominator) for numerator, denominator in ratios]


def _least_limit(ends: list[int], cuts: list[int], parts: int) -> int:
    """The least number that no group's sum has to exceed, by bisection."""
    low, high = 0, ends[-1]
    while low < high:
        middle = (low + high) // 2
        if _fits(ends, cuts, parts, middle):
            high = middle
        else:
            low = middle + 1
    return low


def _fits(ends: list[int], cuts: list[int], parts: int, limit: int) -> bool:
    """Whether ``parts`` groups of at most ``limit`` are enough: every group is made as long as it may be.

    Fewer are enough as well: there are cuts to spare, and a further one makes no sum larger.
    """
    groups, start = 1, 0
    for i in range(1, len(cuts)):
        if ends[cuts[i]] - ends[cuts[start]] > limit:
            groups, start = groups + 1, i - 1
            if groups > parts or ends[cuts[i]] - ends[cuts[start]] > limit:
                return False
    return True


def _most_equal(ends: list[int], cuts: list[int], parts: int, limit: int) -> list[int]:
    """Of the partitions with sums of at most ``limit`` the one with the least sum of squared numbers of items."""
    last = len(cuts) - 1
    # best[i]: (least sum of squares, cut before) of the groups that end at cuts[i]; a tie goes to the earliest cut.
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for group in range(1, parts + 1):
        row: dict[int, tuple[int, int]] = {}
        for i in range(group, last - (parts - group) + 1):
            for j in range(i - 1, group - 2, -1):
                if ends[cuts[i]] - ends[cuts[j]] > limit:
                    break
                if j in best[-1]:
                    found = (best[-1][j][0] + (cuts[i] - cuts[j]) ** 2, j)
                    row[i] = min(row.get(i, found), found)
        best.append(row)
    starts = []
    for row in reversed(best[1:]):
        last = row[last][1]
        starts.append(cuts[last])
    return starts[::-1]
