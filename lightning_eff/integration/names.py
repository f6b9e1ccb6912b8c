"""Precision strings: which are ours, what they ask for, and an answer for the ones nobody knows.

``"luq4+bf16-mixed"`` is our method, and after ``+`` the Lightning precision below it. Case does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_eff.checks import shown
from lightning_eff.errors import UnknownMethodError, UnsupportedCombinationError, nearest
from lightning_eff.methods import METHODS, MethodInfo

__all__ = [
    "LIGHTNING_PRECISIONS",
    "STRATEGIES",
    "Request",
    "check_base",
    "parse_precision",
    "precision_method",
    "precision_strings",
    "unknown_precision",
    "unknown_strategy",
]

_ALIASES = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Historical spellings that Lightning still accepts."""

LIGHTNING_PRECISIONS: tuple[str, ...] = (
    *("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true"),
    *("transformer-engine", "transformer-engine-float16"),
    *_ALIASES,
)
"""Lightning's own precision strings, used to name the nearest one; Lightning itself remains the judge of them."""


@dataclass(frozen=True)
class Request:
    """What a precision string of ours asks for: the method, and the Lightning precision written after ``+`` if any."""

    info: MethodInfo
    base: str | None

    @property
    def base_or_default(self) -> str:
        """The Lightning precision to build: the one asked for, or the method's first."""
        return self.base or (self.info.composes_with or ("32-true",))[0]


def precision_strings() -> tuple[str, ...]:
    """Return every precision string this package adds."""
    return tuple(string for info in METHODS.values() if info.kind == "precision" for string in info.strings)


def unknown_precision(given: object, detail: str = "") -> UnknownMethodError:
    """Return the error for a precision nobody knows; it names the nearest one that exists."""
    allowed = (*precision_strings(), *LIGHTNING_PRECISIONS)
    hint = nearest(str(given).lower(), allowed)
    start = detail or f"Precision {given!r} is invalid. Lightning's precisions: {', '.join(LIGHTNING_PRECISIONS)}."
    return UnknownMethodError(f"{start}{hint} lightning_eff adds: {', '.join(precision_strings())}.")


STRATEGIES = tuple(info for info in METHODS.values() if info.kind == "strategy")
"""Rows of our strategies."""


def unknown_strategy(
    given: str, error: ValueError, *, has_ours: bool
) -> UnknownMethodError | UnsupportedCombinationError:
    """Return the error for a strategy that Lightning does not know: the nearest of ours, or why it has none.

    Args:
        given: what was asked for.
        error: Lightning's.
        has_ours: whether our strategies are known there; Fabric has none of them.
    """
    names = [info.name for info in STRATEGIES]
    if not has_ours and given in names:
        return UnsupportedCombinationError(
            f"strategy={given!r} needs a Trainer, which tells it of micro-batches and steps; Fabric has no loop to do "
            f"that. Use Trainer(strategy={given!r}), or one of Fabric's own strategies here. ({error})"
        )
    ours = f"{nearest(given.lower(), names)} lightning_eff adds: {', '.join(names)}." if has_ours else ""
    return UnknownMethodError(f"{error}{ours}")


def precision_method(name: str) -> MethodInfo:
    """Return the row of a precision method.

    Raises:
        UnknownMethodError: there is none of this name.
    """
    info = METHODS.get(name)
    if info is None or info.kind != "precision":
        names = [row.name for row in METHODS.values() if row.kind == "precision"]
        raise UnknownMethodError(
            f"{shown(name)} is not a precision method.{nearest(name, names)} Known: {', '.join(names)}."
        )
    return info


def parse_precision(value: object) -> Request | None:
    """Return what ``value`` asks of this package, or None when it is not a string of ours.

    Raises:
        UnsupportedCombinationError: our method, with a Lightning precision it does not go with.
        UnknownMethodError: our method, followed by something that is no precision at all.

    Example:
        >>> parse_precision("LUQ4+bf16-mixed").base
        'bf16-mixed'
        >>> parse_precision("bf16-mixed") is None
        True
    """
    if not isinstance(value, str):
        return None
    name, plus, rest = value.lower().partition("+")
    info = METHODS.get(name)
    if info is None or info.kind != "precision":
        return None
    if not plus:
        return Request(info, None)
    if rest not in LIGHTNING_PRECISIONS and rest not in info.composes_with:
        raise UnknownMethodError(
            f"Precision {shown(value)}: {shown(rest)} after '+' is not a precision of Lightning."
            f"{nearest(value.lower(), info.strings)} Allowed: {', '.join(info.strings)}."
        )
    base = _ALIASES.get(rest, rest)
    check_base(info, base)
    return Request(info, base)


def check_base(info: MethodInfo, base: str) -> None:
    """Refuse a Lightning precision that the method has not been shown to work with.

    Raises:
        UnsupportedCombinationError: names the reason and what is allowed.
    """
    if base not in info.composes_with:
        reason = info.conflicts.get(base, "not shown to work")
        raise UnsupportedCombinationError(
            f"{info.name!r} cannot be combined with Lightning's precision {base!r}: {reason}. "
            f"Allowed: {', '.join(f'precision={string!r}' for string in info.strings)}."
        )
