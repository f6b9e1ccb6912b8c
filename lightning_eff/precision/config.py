"""The options of the methods that convert layers, checked once, in one place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_eff.errors import ConfigurationError, nearest
from lightning_eff.functional.luq import GRADIENT_ROUNDINGS, Rounding
from lightning_eff.functional.sawb import Unsigned
from lightning_eff.precision.formats import Format
from lightning_eff.precision.fp8_format import FP8Format, RowwiseFP8Format
from lightning_eff.precision.luq_format import LUQFormat

Products = Literal["auto", "native", "emulated"]
OnNonFinite = Literal["raise", "warn"]
Scaling = Literal["tensorwise", "rowwise", "delayed"]


def check_choice(name: str, given: Any, allowed: Sequence[Any]) -> None:
    """Raise :class:`ConfigurationError` unless ``given`` is one of ``allowed``."""
    if given not in allowed or isinstance(given, bool) != any(
        given is value for value in allowed if isinstance(value, bool)
    ):
        hint = nearest(str(given), [value for value in allowed if isinstance(value, str)])
        raise ConfigurationError(
            f"{name}={given!r} is not allowed; choose one of {', '.join(map(repr, allowed))}.{hint}"
        )


def check_int(name: str, given: Any, low: int, high: int | None = None) -> None:
    """Raise :class:`ConfigurationError` unless ``given`` is an int (no bool) from ``low`` to ``high``."""
    in_range = (
        isinstance(given, int) and not isinstance(given, bool) and low <= given and (high is None or given <= high)
    )
    if not in_range:
        allowed = f"an integer from {low} to {high}" if high is not None else f"an integer of at least {low}"
        raise ConfigurationError(f"{name}={given!r} is not allowed; it must be {allowed}.")


def check_bool(name: str, given: Any) -> None:
    """Raise :class:`ConfigurationError` unless ``given`` is True or False."""
    if not isinstance(given, bool):
        raise ConfigurationError(f"{name}={given!r} is not allowed; it must be True or False.")


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Options every method with converted layers has.

    Raises:
        ConfigurationError: an option is outside its range.
    """

    exempt: tuple[str, ...] = ()
    exempt_first_last: bool = True
    pack_relu: bool = True
    products: Products = "auto"
    measure_every_n_steps: int = 1000
    on_nonfinite: OnNonFinite = "raise"

    def __post_init__(self) -> None:
        check_int("measure_every_n_steps", self.measure_every_n_steps, 0)
        check_choice("products", self.products, get_args(Products))
        check_choice("on_nonfinite", self.on_nonfinite, get_args(OnNonFinite))
        check_bool("pack_relu", self.pack_relu)
        check_bool("exempt_first_last", self.exempt_first_last)
        names = self.exempt if isinstance(self.exempt, Iterable) and not isinstance(self.exempt, str) else (None,)
        if not all(isinstance(pattern, str) for pattern in names):
            raise ConfigurationError(
                f"exempt={self.exempt!r} is not allowed; it is a list of name patterns, ['*.head']."
            )
        object.__setattr__(self, "exempt", tuple(self.exempt))

    def format(self) -> Format:
        """The format these options ask for."""
        raise TypeError(f"{type(self).__name__} names no format")


@dataclass(frozen=True, kw_only=True)
class LUQConfig(LayerConfig):
    """Options of ``luq4``; see :class:`lightning_eff.precision.luq.LUQMixin` for their meaning.

    Raises:
        ConfigurationError: an option is outside its range.
    """

    levels: int = 7
    samples: int = 1
    unsigned: Unsigned = "mirror5"
    hindsight: float | None = None
    power_of_two: bool = False
    gradient_rounding: Rounding = "luq"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("levels", self.levels, 2, 8)
        check_int("samples", self.samples, 1)
        check_choice("unsigned", self.unsigned, (False, "mirror5", "reference"))
        check_choice("gradient_rounding", self.gradient_rounding, GRADIENT_ROUNDINGS)
        check_bool("power_of_two", self.power_of_two)
        momentum = self.hindsight
        is_number = isinstance(momentum, (int, float)) and not isinstance(momentum, bool)
        if momentum is not None and not (is_number and 0 <= momentum < 1):
            raise ConfigurationError(
                f"hindsight={momentum!r} is not allowed; it is a momentum, 0 <= hindsight < 1, or None."
            )
        if self.products == "native" and self.levels > 7:
            raise ConfigurationError("levels=8 has the code 128, beyond int8: use products='auto' or levels=7.")

    def format(self) -> Format:
        """INT4 and FP4."""
        return LUQFormat(self)


@dataclass(frozen=True, kw_only=True)
class FP8Config(LayerConfig):
    """Options of ``fp8``; see :class:`lightning_eff.precision.fp8.FP8Mixin` for their meaning.

    Raises:
        ConfigurationError: an option is outside its range.
    """

    scaling: Scaling = "tensorwise"
    power_of_two: bool | None = None
    history: int = 1024
    margin: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scaling", self.scaling, get_args(Scaling))
        check_int("history", self.history, 1)
        check_int("margin", self.margin, -8, 8)
        if self.power_of_two is None:
            object.__setattr__(self, "power_of_two", self.scaling == "rowwise")
        check_bool("power_of_two", self.power_of_two)

    def format(self) -> Format:
        """E4M3 and E5M2."""
        return RowwiseFP8Format(self) if self.scaling == "rowwise" else FP8Format(self)
