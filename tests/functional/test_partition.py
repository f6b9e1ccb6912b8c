"""Balanced partitions against all partitions, by brute force; what cannot be cut is refused with the reason."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.partition import balance


def all_partitions(num_items: int, parts: int, together: list[tuple[int, int]]) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.combinations(range(1, num_items), parts - 1):
        if not any(first < cut <= last for first, last in together for cut in cuts):
            yield (0, *cuts)


def groups(starts: tuple[int, ...], num_items: int) -> list[range]:
    return [range(start, end) for start, end in itertools.pairwise([*starts, num_items])]


def figures(starts: tuple[int, ...], costs: list[float]) -> tuple[float, int]:
    """Largest sum, then how unequal the counts are."""
    found = groups(starts, len(costs))
    return max(math.fsum(costs[i] for i in group) for group in found), sum(len(group) ** 2 for group in found)


# Multiples of 1/4: sums are exact in any order, so that ties are ties for the brute force as well.
COSTS = st.lists(st.integers(0, 12).map(lambda quarters: quarters / 4), min_size=1, max_size=9)


@given(COSTS, st.integers(1, 9), st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=2))
def test_no_partition_is_better(costs: list[float], parts: int, ranges: list[tuple[int, int]]) -> None:
    num_items = len(costs)
    together = [(min(pair), max(pair)) for pair in ranges if max(pair) < num_items]
    every = list(all_partitions(num_items, parts, together))
    if not every:
        with pytest.raises(ConfigurationError, match=f"parts={parts}"):
            balance(costs, parts, together=together)
        return
    found = tuple(balance(costs, parts, together=together))
    assert found in every
    assert figures(found, costs) == min(figures(starts, costs) for starts in every)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(1, 8))
def test_real_costs(costs: list[float], parts: int) -> None:
    parts = min(parts, len(costs))
    found = tuple(balance(costs, parts))
    best = min(figures(starts, costs)[0] for starts in all_partitions(len(costs), parts, []))
    assert figures(found, costs)[0] <= best * (1 + 1e-15)


@pytest.mark.parametrize("cost", [0.0, 0.1, 1 / 3, 1e300])
def test_equal_costs_make_equal_groups(cost: float) -> None:
    """Rounded sums of equal costs differ: 3 * 0.1 is not 0.6 - 0.3. Exact ones do not."""
    assert balance([cost] * 12, 4) == [0, 3, 6, 9]
    counts = [len(group) for group in groups(tuple(balance([cost] * 14, 4)), 14)]
    assert sorted(counts) == [3, 3, 4, 4]


def test_free_items_do_not_pile_up() -> None:
    assert balance([8, 0, 0, 0, 0, 0], 3) == [0, 2, 4]


def test_what_belongs_together_stays_together() -> None:
    assert balance([1] * 8, 4) == [0, 2, 4, 6]
    assert balance([1] * 8, 4, together=[(1, 4)]) == [0, 1, 5, 6]  # a tie goes to the earlier cut
    assert balance([1] * 8, 2, together=[(1, 3), (3, 6)]) == [0, 1]
    assert balance([1] * 8, 8, together=[(3, 3)]) == list(range(8))
    assert balance([1] * 8, 1, together=[(0, 7)]) == [0]


def test_many_layers() -> None:
    costs = [float(1 + (7 * i) % 13) for i in range(400)]
    starts = balance(costs, 32)
    assert len(starts) == 32
    assert figures(tuple(starts), costs)[0] < sum(costs) / 32 + 13


@pytest.mark.parametrize(
    ("costs", "parts", "together", "message"),
    [
        ([], 1, [], "parts=1 is not allowed for 0 items"),
        ([1, 1], 3, [], "parts=3 is not allowed for 2 items; no group may be empty"),
        ([1, 1], 0, [], "parts=0 is not allowed"),
        ([1, 1, 1], 2, [(0, 2)], r"with together=\[\(0, 2\)\] the 3 items can be cut into 1 groups at most"),
        ([1, 1, 1], 2, [(2, 1)], r"together has the range \(2, 1\).*from 0 to 2"),
        ([1, 1, 1], 2, [(1, 3)], r"together has the range \(1, 3\)"),
        ([1, -1], 1, [], "The cost of item 1 is -1"),
        ([math.nan], 1, [], "The cost of item 0 is nan"),
        ([1, math.inf], 1, [], "The cost of item 1 is inf"),
    ],
)
def test_what_is_not_allowed(costs: list[float], parts: int, together: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        balance(costs, parts, together=together)
