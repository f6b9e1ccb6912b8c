"""Attributes of Lightning's objects that are exchanged for the length of a run, of one instance each, and put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Undo", "replaced"]

Undo = Callable[[], None]
_ABSENT = object()


def replaced(owner: Any, name: str, value: Any) -> Undo:
    """Set an attribute of an instance; the result sets back what was there."""
    before = owner.__dict__.get(name, _ABSENT)
    owner.__dict__[name] = value

    def undo() -> None:
        owner.__dict__.pop(name, None)
        if before is not _ABSENT:
            owner.__dict__[name] = before

    return undo
