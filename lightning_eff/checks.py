"""What an option, or a number in a checkpoint, may be: one vocabulary of rules and one sentence for what is refused.

A rule looks at the type before it compares, so that whatever is given (None, text, an array, a tensor, an object whose
comparison raises) is either read or refused, and nothing else happens. What is read comes back as a plain Python value:
numpy's integers and floats are numbers (:class:`numbers.Integral`, :class:`numbers.Real`), an ``int`` is a real number,
a ``bool`` is neither, and a tensor is no number, also if it holds one (``.item()`` takes it out).
"""

from __future__ import annotations

import math
import numbers
import operator
import re
import reprlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

from lightning_eff.errors import ConfigurationError, nearest

MOST = 2**53
"""The largest count that is ever meant, and the last up to which floats hold every whole number."""


class NotAllowedError(Exception):
    """A rule does not allow a value; :func:`check` and ``methods.state`` make errors for people of it.

    Args:
        where: the option, or the path of keys to the value.
        given: the value.
        allowed: what is allowed there, after "it must be".
        hint: a further sentence, with a space before it, or nothing.
    """

    def __init__(self, where: str, given: Any, allowed: str, hint: str = "") -> None:
        super().__init__(where, allowed)
        self.where, self.given, self.allowed, self.hint = where, given, allowed, hint

    def __str__(self) -> str:
        return f"{self.where or 'the state'}={shown(self.given)} is not allowed; it must be {self.allowed}.{self.hint}"


@dataclass
class Place:
    """Where a value stands.

    Attributes:
        where: the option, or the path of keys.
        unknown: paths of keys that no rule knows, collected for all places below one.
    """

    where: str
    unknown: list[str] = field(default_factory=list)

    def at(self, key: object) -> Place:
        """The place below this one."""
        return Place(f"{self.where}[{shown(key)}]" if self.where else str(key), self.unknown)

    def refuse(self, given: Any, rule: Rule, hint: str = "") -> NotAllowedError:
        """The error for what ``rule`` does not allow here."""
        return NotAllowedError(self.where, given, rule.allowed, hint)


class Rule(Protocol):
    """What is allowed somewhere."""

    @property
    def allowed(self) -> str:
        """What is allowed, for people; it continues "it must be"."""
        ...

    def read(self, given: Any, place: Place) -> Any:
        """Return ``given`` as a plain value, or raise :class:`NotAllowedError`."""
        ...


def check(name: str, given: Any, rule: Rule) -> Any:
    """Return an option as a plain value.

    Raises:
        ConfigurationError: ``rule`` does not allow it; the message says what it does.

    Example:
        >>> check("levels", 7, Whole(2, 8))
        7
        >>> check("levels", "7", Whole(2, 8))
        Traceback (most recent call last):
        lightning_eff.errors.ConfigurationError: levels='7' is not allowed; it must be a whole number from 2 to 8.
    """
    try:
        return rule.read(given, Place(name))
    except NotAllowedError as error:
        raise ConfigurationError(str(error)) from None


def checked(rules: Mapping[str, Rule], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that ``rules`` names, of a constructor's ``locals()`` for instance, as plain values.

    Raises:
        ConfigurationError: a rule does not allow its option.
    """
    return {name: check(name, given[name], rule) for name, rule in rules.items()}


# ------------------------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Whole:
    """A whole number from ``low`` to ``high``; bool is none."""

    low: int = 0
    high: int = MOST
    why: str = ""
    """Why not more, after the range."""

    @property
    def allowed(self) -> str:
        """See :class:`Rule`."""
        if self.high == MOST:
            return f"a whole number, {self.low} or more (2**53 at most)"
        return f"a whole number from {self.low} to {self.high}" + (f" ({self.why})" if self.why else "")

    def read(self, given: Any, place: Place) -> int:
        """See :class:`Rule`."""
        if type(given) is int or _is(given, numbers.Integral):
            number = int(operator.index(given))
            if self.low <= number <= self.high:
                return number
        raise place.refuse(given, self)


@dataclass(frozen=True)
class Real:
    """A real number between ``low`` and ``high``; NaN is allowed only where asked for, inf only where ``high`` is.

    Args:
        low: least.
        high: most; None for any finite number.
        above: ``low`` itself is not allowed.
        below: ``high`` itself is not allowed.
        nan: NaN is allowed; what it means.
    """

    low: float = -math.inf
    high: float | None = None
    above: bool = False
    below: bool = False
    nan: str = ""

    @property
    def allowed(self) -> str:
        """See :class:`Rule`."""
        low = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        high = "" if self.high is None else f"below {self.high:g}" if self.below else f"{self.high:g} at most"
        limits = [text for text in ("" if self.low == -math.inf else low, high) if text]
        finite = "" if self.high == math.inf else "finite "
        return (
            f"a {finite}number"
            + (f", {', '.join(limits)}" if limits else "")
            + (f", or nan ({self.nan})" if self.nan else "")
        )

    def read(self, given: Any, place: Place) -> float:
        """See :class:`Rule`."""
        if _is(given, numbers.Real):
            try:
                number = float(given)
            except OverflowError:  # an int that is no float
                raise place.refuse(given, self) from None
            if self._holds(number):
                return number
        raise place.refuse(given, self)

    def _holds(self, number: float) -> bool:
        if math.isnan(number):
            return bool(self.nan)
        high_enough = number > self.low if self.above else number >= self.low
        if self.high is None:
            return high_enough and math.isfinite(number)
        return high_enough and (number < self.high if self.below else number <= self.high)


SHARE = Real(0, 1)
"""A share of something, 0 to 1."""


# -------------------------------------------------------------------------------------------------------- other values


@dataclass(frozen=True)
class YesNo:
    """True or False; numpy's too, numbers and text are neither."""

    allowed: str = "True or False"

    def read(self, given: Any, place: Place) -> bool:
        """See :class:`Rule`."""
        kind = type(given)
        if kind is bool or (kind.__module__ == "numpy" and kind.__name__ in {"bool", "bool_"}):
            return bool(given)
        raise place.refuse(given, self)


class Choice:
    """One of some values: text, numbers, True, False or None."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    @property
    def allowed(self) -> str:
        """See :class:`Rule`."""
        return f"one of {', '.join(map(repr, self.values))}"

    def read(self, given: Any, place: Place) -> Any:
        """See :class:`Rule`; text that is nearly one of the values is told which."""
        for value in self.values:
            if _same(value, given):
                return value
        names = [value for value in self.values if isinstance(value, str)]
        hint = nearest(str.__str__(given), names) if _is(given, str) else ""
        raise place.refuse(given, self, hint)


def _same(value: Any, given: Any) -> bool:
    """Whether ``given`` is the value of a choice, of its own kind: 1 is not True, and 8.0 not 8."""
    if value is None or isinstance(value, bool):
        return given is value
    if isinstance(value, str):
        return _is(given, str) and str.__eq__(given, value)
    return _is(given, numbers.Integral) and operator.index(given) == value


def _is(given: Any, *kinds: type) -> bool:
    """``isinstance`` that asks the type alone (an object may say anything of its class); bool is no number."""
    return type(given) is not bool and issubclass(type(given), kinds)


@dataclass(frozen=True)
class Text:
    """Text that matches ``pattern``, if there is one."""

    allowed: str = "text"
    pattern: str = ""

    def read(self, given: Any, place: Place) -> str:
        """See :class:`Rule`."""
        if _is(given, str) and (not self.pattern or re.fullmatch(self.pattern, given)):
            return str.__str__(given)
        raise place.refuse(given, self)


@dataclass(frozen=True)
class Names:
    """A list (or tuple, or set) of names or of patterns of names; a single string is none. It is read as a tuple."""

    allowed: str = "a list of name patterns, ['*.head']"
    least: int = 0

    def read(self, given: Any, place: Place) -> tuple[str, ...]:
        """See :class:`Rule`."""
        if not _is(given, Sequence, Set) or _is(given, str, bytes, bytearray):
            raise place.refuse(given, self)
        names: list[str] = []
        for name in given:
            if not _is(name, str):
                raise place.refuse(given, self)
            names.append(str.__str__(name))
        if len(names) < self.least:
            raise place.refuse(given, self)
        return tuple(sorted(names) if _is(given, Set) else names)  # sets have another order on every rank


@dataclass(frozen=True)
class Instance:
    """An object of a class."""

    kind: type
    allowed: str

    def read(self, given: Any, place: Place) -> Any:
        """See :class:`Rule`."""
        if issubclass(type(given), self.kind):
            return given
        raise place.refuse(given, self)


@dataclass(frozen=True)
class Maybe:
    """What ``rule`` allows, or None."""

    rule: Rule

    @property
    def allowed(self) -> str:
        """See :class:`Rule`."""
        return f"{self.rule.allowed}, or None"

    def read(self, given: Any, place: Place) -> Any:
        """See :class:`Rule`."""
        if given is None:
            return None
        try:
            return self.rule.read(given, place)
        except NotAllowedError as error:
            if error.where == place.where:
                error.allowed = self.allowed
            raise


class Either:
    """What one of several rules allows; the first that does reads it."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules

    @property
    def allowed(self) -> str:
        """See :class:`Rule`."""
        return ", or ".join(rule.allowed for rule in self.rules)

    def read(self, given: Any, place: Place) -> Any:
        """See :class:`Rule`."""
        hint = ""
        for rule in self.rules:
            try:
                return rule.read(given, place)
            except NotAllowedError as error:  # noqa: PERF203 - the next one may allow it
                hint = hint or error.hint
        raise place.refuse(given, self, hint)


SEED = Whole(0, 2**64 - 1)
"""64 bits, as torch's generators take."""
TIMEOUT = Real(0.001, 1e9)
"""Seconds to wait: at least one of gloo's milliseconds, and no more than a timedelta and its milliseconds hold."""
ON_NONFINITE = Choice("raise", "warn")


# --------------------------------------------------------------------------------------------------------- for people


class _Shown(reprlib.Repr):
    """A short repr of anything."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 120
        self.maxlevel, self.maxlist, self.maxtuple, self.maxset, self.maxdict = 3, 8, 8, 8, 6

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write very long ones."""
        return repr(x) if x.bit_length() <= 128 else f"<an integer of {x.bit_length()} bits>"


def shown(given: Any) -> str:
    """A short ``repr`` on one line: of an array its type and shape, of what cannot be written its type.

    Example:
        >>> shown("x" * 10_000), shown(10**5000)
        ("'xxx...", '<an integer of 16610 bits>')
    """
    kind = type(given).__name__
    try:
        if getattr(given, "ndim", 0) and hasattr(given, "shape"):
            return f"<{kind} of shape {tuple(given.shape)} and dtype {given.dtype}>"
        text = " ".join(_Shown().repr(given).split())
        return text if len(text) <= 200 else f"{text[:197]}..."
    except Exception:  # noqa: BLE001 - the user's objects may raise anything
        return f"<{kind}>"
