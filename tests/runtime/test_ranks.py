"""What rank 0 finds every rank is told, its errors too."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_eff.runtime.ranks import find_on_rank_0
from tests.harness import run_ranks


class TwoArgumentsError(Exception):
    def __init__(self, a: str, b: str) -> None:
        super().__init__(f"{a} and {b}")


def _ask_rank_0(rank: int, world: int, kind: str) -> Any:
    class LocalError(Exception):
        pass

    def find() -> int:
        assert rank == 0, "the others are told"
        if kind == "local":
            raise LocalError("of the user's code")
        if kind == "two":
            raise TwoArgumentsError("this", "that")
        if kind == "value":
            raise ValueError("of the user's code")
        return 7

    try:
        return find_on_rank_0(find)
    except Exception as error:  # noqa: BLE001 - it is what is looked at
        return type(error).__name__, str(error)


@pytest.mark.parametrize(
    ("kind", "told_"),
    [("", 7), ("value", "of the user's code"), ("local", "of the user's code"), ("two", "this and that")],
)
def test_the_error_of_rank_0_is_everybodys(kind: str, told_: Any) -> None:
    """Also one that cannot be sent, or cannot be made again from its message."""
    first, second = run_ranks(_ask_rank_0, 2, kind)
    if kind:
        assert first == ({"value": "ValueError", "local": "LocalError", "two": "TwoArgumentsError"}[kind], told_)
        assert told_ in second[1]
    else:
        assert (first, second) == (told_, told_)
