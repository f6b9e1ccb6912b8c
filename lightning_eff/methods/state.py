"""What a method keeps in a checkpoint, declared key by key, and the one function that looks at it before it is used.

A row of :data:`~lightning_eff.methods.METHODS` has a :class:`Record`: keys, types, ranges, what may be missing.
:func:`read_state` holds what a checkpoint has against it and returns plain values; callers change nothing before it has
returned, so that a state is taken as a whole or not at all. Keys that no rule knows are warned of and left out: they
are a newer version's. This part imports no torch: tensors are known by what they are, where there is torch already.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lightning_eff.checks import (
    MOST,
    SEED,
    Choice,
    Maybe,
    NotAllowedError,
    Place,
    Real,
    Rule,
    Text,
    Whole,
    YesNo,
    shown,
)
from lightning_eff.errors import CheckpointError, EffWarning

FLOAT32_MAX = (2 - 2**-23) * 2.0**127


# ---------------------------------------------------------------------------------------------------------- containers


class Record:
    """A mapping with these keys; those of ``optional`` may be missing, with the value they then have.

    Args:
        keys: key -> rule.
        optional: key -> value where an older version did not write it.
        also: looks at the whole record that was read; a sentence about what must hold if it does not.
    """

    allowed = "a mapping"

    def __init__(
        self,
        keys: Mapping[str, Rule],
        *,
        optional: Mapping[str, Any] = MappingProxyType({}),
        also: Callable[[dict[str, Any]], str] | None = None,
    ) -> None:
        self.keys, self.optional, self.also = dict(keys), dict(optional), also

    def read(self, given: Any, place: Place) -> dict[str, Any]:
        """See :class:`~lightning_eff.checks.Rule`."""
        if not isinstance(given, Mapping):
            raise place.refuse(given, self)
        found: dict[str, Any] = {}
        for key, rule in self.keys.items():
            if key in given:
                found[key] = rule.read(given[key], place.at(key))
            elif key in self.optional:
                found[key] = self.optional[key]
            else:
                raise Missing(place.at(key).where, rule, [*given])
        place.unknown += [place.at(key).where for key in given if key not in self.keys]
        if self.also is not None and (wrong := self.also(found)):
            raise Contradiction(place.where, given, wrong)
        return found


class Missing(NotAllowedError):  # noqa: N818 - a case of NotAllowedError
    """A key that has to be there is not."""

    def __init__(self, where: str, rule: Rule, present: Sequence[object]) -> None:
        super().__init__(where, None, rule.allowed)
        self.present = present

    def __str__(self) -> str:
        there = ", ".join(shown(key) for key in self.present[:8]) or "nothing"
        return f"{self.where} is missing; it must be {self.allowed}. There is: {there}."


class Contradiction(NotAllowedError):  # noqa: N818 - a case of NotAllowedError
    """Each value may be, and not all of them together."""

    def __str__(self) -> str:
        return f"{self.where or 'the state'} contradicts itself; it must have {self.allowed}."


@dataclass(frozen=True)
class Table:
    """A mapping from names (of layers, say) to values of one kind."""

    rule: Rule
    names: Rule = field(default_factory=Text)
    allowed: str = "a mapping from names"

    def read(self, given: Any, place: Place) -> dict[str, Any]:
        """See :class:`~lightning_eff.checks.Rule`."""
        if not isinstance(given, Mapping):
            raise place.refuse(given, self)
        where = place.where
        return {
            self.names.read(key, Place(f"a key of {where}")): self.rule.read(value, place.at(key))
            for key, value in given.items()
        }


@dataclass(frozen=True)
class ListOf:
    """A list of values of one kind."""

    rule: Rule
    least: int = 0

    @property
    def allowed(self) -> str:
        """See :class:`~lightning_eff.checks.Rule`."""
        return "a list" + (f" of {self.least} or more" if self.least else "")

    def read(self, given: Any, place: Place) -> list[Any]:
        """See :class:`~lightning_eff.checks.Rule`."""
        if not isinstance(given, list | tuple) or len(given) < self.least:
            raise place.refuse(given, self)
        return [self.rule.read(value, place.at(i)) for i, value in enumerate(given)]


@dataclass(frozen=True)
class TensorOf:
    """A dense tensor, of one dtype if it is named (``"int16"``), and with finite elements only."""

    dtype: str = ""

    @property
    def allowed(self) -> str:
        """See :class:`~lightning_eff.checks.Rule`."""
        return f"a tensor of dtype {self.dtype}" if self.dtype else "a tensor of finite floating-point numbers"

    def read(self, given: Any, place: Place) -> Any:
        """See :class:`~lightning_eff.checks.Rule`."""
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(given, torch.Tensor) or given.layout is not torch.strided:
            raise place.refuse(given, self)
        right = given.dtype is getattr(torch, self.dtype) if self.dtype else given.is_floating_point()
        if not right or (given.is_floating_point() and not bool(given.isfinite().all())):
            raise place.refuse(given, self)
        return given


# ------------------------------------------------------------------------------------------------- reading a state


def read_state(rule: Record, state: Any, *, of: str, remove: str, known: Collection[str] = ()) -> dict[str, Any]:
    """Return what ``rule`` declares, as plain values; nothing is changed anywhere.

    Args:
        rule: of the method.
        state: what the checkpoint has.
        of: the method, for people.
        remove: the statement that takes the state out of a loaded ``checkpoint``.
        known: keys at the top that belong to somebody else (a base class, a subclass).

    Raises:
        CheckpointError: a key is missing or holds what is not allowed; it is named, with what was found and expected.
    """
    place = Place("")
    try:
        found = rule.read(state, place)
    except NotAllowedError as error:
        raise damaged(of, error, remove=remove) from None
    if unknown := [key for key in place.unknown if key not in known]:
        warnings.warn(
            f"{of}: the checkpoint has what this version does not know and leaves out: {', '.join(unknown[:8])}. "
            "It was made by a newer version; with that one the run would continue exactly.",
            EffWarning,
            stacklevel=3,
        )
    return found


def read_estimate(rule: Record, state: Any, *, of: str) -> dict[str, Any]:
    """Return what an object's ``load_state_dict`` was given, as plain values.

    Raises:
        CheckpointError: a key is missing or holds what is not allowed.
    """
    try:
        return rule.read(state, Place(""))
    except NotAllowedError as error:
        raise CheckpointError(
            f"{of}.load_state_dict: {error} Nothing was loaded. Give it what {of}.state_dict returned."
        ) from None


def damaged(of: str, what: object, *, remove: str) -> CheckpointError:
    """The error for a state that cannot be taken."""
    return CheckpointError(
        f"{of}: its state in the checkpoint cannot be used: {what} Nothing of it was loaded. The file is damaged, was "
        f"edited, or is from another version. To resume without what {of} remembers: checkpoint = torch.load(path, "
        f"weights_only=True); {remove}; torch.save(checkpoint, path)."
    )


# ------------------------------------------------------------------------------------------------ what methods keep

PHASE = Choice("quantized", "weights_only")
MAGNITUDE = Real(0, FLOAT32_MAX)
"""A largest magnitude."""
STREAM: Mapping[str, Rule] = MappingProxyType({"seed": Maybe(SEED), "calls": Whole()})
"""A rounding stream: without either a resumed run would round otherwise, in silence."""


def begun(found: dict[str, Any]) -> str:
    """A stream that has been drawn from has a seed."""
    return "a seed and calls, or no seed and no calls" if found["seed"] is None and found["calls"] else ""


@dataclass(frozen=True)
class PowerOfTwo:
    """A power of two that float32 holds: what a unit of an integer format is worth."""

    allowed: str = "a power of two from 2**-126 to 2**127"

    def read(self, given: Any, place: Place) -> float:
        """See :class:`~lightning_eff.checks.Rule`."""
        number = Real(2.0**-126, 2.0**127).read(given, place)
        if math.frexp(number)[0] != 0.5:
            raise place.refuse(given, self)
        return number


def _looked_back(found: dict[str, Any]) -> str:
    """The estimate is there from the first magnitude above zero on."""
    seen, estimated = max(found["history"], default=0.0) > 0, found["max_abs"] is not None
    return "" if estimated >= seen and (found["history"] or not estimated) else "a max_abs that follows from history"


def _sums(found: dict[str, Any]) -> str:
    """Sums over no fit are zero, and a share is one at most."""
    nothing = not found["fits"] and found["sigma_log2"]
    return "" if not nothing and found["zeros"] <= found["fits"] * (1 + 1e-9) else "sums over so many fits"


HINDSIGHT = Record({"value": Real(0, FLOAT32_MAX, nan="before the first step")})
"""State of :class:`lightning_eff.functional.HindsightMax`."""
DELAYED = Record({"history": ListOf(MAGNITUDE), "max_abs": Maybe(Real(0, above=True))}, also=_looked_back)
"""State of :class:`lightning_eff.functional.DelayedScale`."""
AUTOFLEX = Record(
    {
        "scale": PowerOfTwo(),
        "history": ListOf(Real(0, 2 * FLOAT32_MAX)),
        "overflows": Whole(),
        "initialised": YesNo(),
    }
)
"""State of :class:`lightning_eff.functional.Autoflex`."""


def fitted_format(bits: int) -> Record:
    """State of :class:`lightning_eff.functional.FittedFormat`."""

    def in_float32(found: dict[str, Any]) -> str:
        e, bias = found["exponent_bits"], found["bias"]
        smallest, largest = 1 - bias - (bits - 1 - e), 2**e - 1 - bias if e else -bias
        return "" if smallest >= -126 and largest <= 100 else "a format with values between 2**-126 and 2**100"

    keys: dict[str, Rule] = {"exponent_bits": Whole(0, bits - 1), "bias": Whole(-126, 254), "fitted": YesNo()}
    return Record(keys, also=in_float32)


def memory(estimate: Rule) -> Rule:
    """Layer -> role -> estimate."""
    return Table(Table(estimate))


def phase_and(*, stream: bool = False, optional: Mapping[str, Any] = MappingProxyType({}), **keys: Rule) -> Record:
    """What every method with converted layers keeps, and more.

    Args:
        stream: whether it rounds at random.
        optional: keys that another variant of the method does not write; the run warns where it lacks them.
        keys: what else it keeps.
    """
    own = {**(STREAM if stream else {}), "phase": PHASE, **keys}
    return Record(own, optional=optional, also=begun if stream else None)


UPDATES = Record(
    {
        "update": Choice("sr", "kahan", "split"),
        "seed": SEED,
        "steps": Whole(),
        "streams": Maybe(ListOf(Whole(0, 2**63 - 1))),
    },
    optional={"streams": None},  # of sr alone; the first versions knew parameters by their place
)
"""The numbers under ``bf16`` in an optimizer's state."""
LAYER_OF_PRUNING = Record(
    {
        "threshold": Real(0, nan="before the first fit"),
        "sigma": Real(0, nan="before the first fit"),
        "next_fit": Whole(0, 2 * MOST),
        "correction": Real(-7, 7),
        "calls": Whole(),
    }
)
LAYER_OF_STATISTICS = Record({"fits": Whole(), "sigma_log2": Real(0), "zeros": Real(0)}, also=_sums)
