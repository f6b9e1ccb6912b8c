"""The public classes, their options, and what a run does first with an object of one."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import random
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest

from lightning_eff.errors import EffError
from lightning_eff.functional.numerics.flexpoint import Autoflex
from lightning_eff.functional.numerics.float_format import FloatFormat
from lightning_eff.functional.numerics.fp8 import DelayedScale
from lightning_eff.functional.numerics.lognormal import FittedFormat
from lightning_eff.functional.numerics.luq import HindsightMax
from lightning_eff.functional.stragglers.simulated import LognormalDelay, SlowRankDelay, StallDelay
from tests.arguments.values import WILD

CALLS = 300


def public(kind: str) -> Iterator[type[Any]]:
    module = importlib.import_module(f"lightning_eff.{kind}")
    yield from (getattr(module, name) for name in module.__all__)


LIGHTNING = [cls for kind in ("precision", "strategies", "callbacks") for cls in public(kind)]
ESTIMATES = [Autoflex, DelayedScale, HindsightMax, FittedFormat, FloatFormat]
DELAYS = [LognormalDelay, StallDelay, SlowRankDelay]
every_class = pytest.mark.parametrize("cls", [*LIGHTNING, *ESTIMATES, *DELAYS], ids=lambda cls: cls.__name__)
every_lightning_class = pytest.mark.parametrize("cls", LIGHTNING, ids=lambda cls: cls.__name__)

REQUIRED: dict[str, dict[str, Any]] = {
    "LUQFineTuning": {"steps": 5},
    "FittedFormat": {"bits": 8},
    "FloatFormat": {"exponent_bits": 4, "mantissa_bits": 3},
}


def options_of(cls: type[Any]) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name not in ("self", "args", "kwargs")]


def literals(annotation: Any) -> list[Any]:
    """The values an annotation names."""
    found: list[Any] = []
    for part in get_args(annotation):
        found += literals(part) if get_args(part) else [part] if isinstance(part, str | int | bool) else []
    return found


def pool(cls: type[Any], name: str, wild: list[Any]) -> list[Any]:
    owner = cls.__init__
    hints = get_type_hints(owner)
    default = inspect.signature(cls).parameters[name].default
    return [default, *literals(hints.get(name)), *wild] if default is not inspect.Parameter.empty else wild


def made(cls: type[Any], options: dict[str, Any]) -> tuple[Any, str]:
    """The object, or the message of an error of ours; any other error fails the test."""
    try:
        return cls(**{**REQUIRED.get(cls.__name__, {}), **options}), ""
    except EffError as error:
        return None, str(error)


def plain(value: Any) -> bool:
    """Whether a kept option is a plain value, so that what is done with it later cannot surprise."""
    if isinstance(value, tuple | list):
        return all(plain(part) for part in value)
    return value is None or type(value) in {bool, int, float, str}


def used(thing: Any) -> None:
    """What a run does first with an object that was made."""
    if dataclasses.is_dataclass(given := getattr(thing, "options", None)):
        given.format().histories()
        assert all(plain(getattr(given, field.name)) for field in dataclasses.fields(given))
    else:
        kept = {name: value for name, value in vars(thing).items() if name in options_of(type(thing))}
        assert all(plain(value) or name in {"delay", "options", "mitigation"} for name, value in kept.items())
    if type(thing).__name__ not in {"DropComputeStrategy", "PipelinedBPStrategy"} and hasattr(thing, "state_dict"):
        thing.state_dict()
    if isinstance(thing, tuple(DELAYS)):
        assert math.isfinite(thing.extra_s(3, 0, 1, 0.1))
    if hasattr(thing, "update") and callable(thing.update):
        thing.update(*([1.0] * (2 if isinstance(thing, FittedFormat) else 1)))


def accepted(cls: type[Any], number: int) -> list[dict[str, Any]]:
    """Options, of one to three kinds, that a class takes."""
    draw = random.Random(cls.__name__)
    names = options_of(cls)
    values = {name: [v for v in pool(cls, name, WILD) if made(cls, {name: v})[0] is not None] for name in names}
    found: list[dict[str, Any]] = []
    while len(found) < number:
        options = {name: draw.choice(values[name]) for name in draw.sample(names, k=min(3, len(names)))}
        if made(cls, options)[0] is not None:
            found.append(options)
    return found
