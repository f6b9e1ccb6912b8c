"""Exchange attributes of single instances of Lightning's classes for the length of a run, and put them back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["Undo", "join_undos", "replace_attribute"]

Undo = Callable[[], None]
"""Puts back what was exchanged; a second call does no harm."""
_ABSENT = object()


def replace_attribute(owner: Any, name: str, value: Any) -> Undo:
    """Set an attribute of one instance and return the function that sets back what was there."""
    before = owner.__dict__.get(name, _ABSENT)
    owner.__dict__[name] = value

    def undo() -> None:
        owner.__dict__.pop(name, None)
        if before is not _ABSENT:
            owner.__dict__[name] = before

    return undo


def join_undos(undos: Iterable[Undo]) -> Undo:
    """Return one function that runs all of these, the last first."""
    joined = list(undos)

    def undo() -> None:
        for put_back in reversed(joined):
            put_back()

    return undo
