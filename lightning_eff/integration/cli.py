"""LightningCLI: let ``--trainer.precision luq4`` and YAML through the parser, and refuse wrong names with a hint.

jsonargparse validates against the annotation of ``Trainer.__init__``, a ``Literal`` of Lightning's own names. The
annotation is widened with :class:`PrecisionName`, whose parser knows our strings. jsonargparse is optional and is not
imported here: the type is registered when, and if, somebody else imports it.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable
from typing import Any

from lightning_eff.integration.names import parse_precision, unknown_precision

__all__ = ["PrecisionName", "parse_name", "register_with_jsonargparse", "widen_precision"]


class PrecisionName(str):
    """A precision string of this package, for example ``"luq4"`` or ``"luq4+bf16-mixed"``."""

    __slots__ = ()


def parse_name(value: object) -> PrecisionName:
    """Return ``value`` as a precision string of ours.

    Raises:
        UnknownMethodError: it is none; the message names the nearest valid name.
        UnsupportedCombinationError: the precision after ``+`` does not go with the method.
    """
    if parse_precision(value) is None:
        raise unknown_precision(value)
    return PrecisionName(value)


def register_with_jsonargparse() -> None:
    """Teach jsonargparse the type; it must be imported already."""
    sys.modules["jsonargparse"].typing.register_type(PrecisionName, deserializer=parse_name)


def widen_precision(function: Callable[..., Any]) -> None:
    """Add :class:`PrecisionName` to the ``precision`` annotation of ``function`` and of what it wraps.

    Doing it again changes nothing.
    """
    layer: Any = function
    while layer is not None:
        annotations = getattr(layer, "__annotations__", {})
        present = annotations.get("precision")
        if isinstance(present, str):  # a module with postponed annotations
            present = typing.get_type_hints(layer)["precision"]
        if present is not None:
            layer.__annotations__ = {**annotations, "precision": present | PrecisionName}
        layer = getattr(layer, "__wrapped__", None)
