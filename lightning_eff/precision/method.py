"""What makes a precision plugin the plugin of one method: the string it was asked for by, and the options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_eff.checks import Choice, check
from lightning_eff.errors import ConfigurationError
from lightning_eff.integration.bases import PrecisionBase
from lightning_eff.methods import METHODS, MethodInfo


def options_from(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options a constructor was given, from its ``locals()``."""
    return {key: value for key, value in arguments.items() if key not in ("self", "__class__")}


def variants_of(info: MethodInfo) -> list[MethodInfo]:
    """Return the rows of the methods that share a class with ``info``, itself included."""
    return [row for row in METHODS.values() if row.class_name == info.class_name]


def keys_of_variants(info: MethodInfo) -> set[str]:
    """Return the state keys of the methods that share a class: a run may go on with another variant."""
    return {key for row in variants_of(info) for key in row.state_keys}


class MethodMixin(PrecisionBase):
    """Makes a precision plugin carry one of the methods of its class.

    Subclasses set ``info``, the first of the class's rows, and take the options in ``_begin``. What a string means is
    said in its row: ``info.options``.
    """

    info: MethodInfo
    eff_method: str

    def configure_method(self, **options: Any) -> None:
        """Set the method up after construction, or after a graft, which has said by which string it was asked for.

        Args:
            options: arguments of the class; after a graft those that were given.

        Raises:
            ConfigurationError: an option is outside its range, or contradicts the string.
        """
        self._begin(**self._with_variant(options))

    def _begin(self, **options: Any) -> None:
        """Take the options and begin without a run."""

    def _with_variant(self, options: dict[str, Any]) -> dict[str, Any]:
        """Note which variant of its class the plugin is; return the options with those that its string means."""
        own = type(self).info
        if not own.options:
            return options
        asked = self.__dict__.get("eff_method")
        named = METHODS.get(asked or "", own)
        rows = variants_of(own)
        meant = {
            option: self._variant_option(option, options.get(option, value), named, asked, rows)
            for option, value in named.options.items()
        }
        self.info = next(row for row in rows if row.options == meant)
        self.eff_method = self.info.name
        return {**options, **meant}

    @staticmethod
    def _variant_option(
        option: str, given: Any, named: MethodInfo, asked: str | None, rows: list[MethodInfo]
    ) -> object:
        """Return the value of an option that tells variants apart; a graft may leave it out, or give None."""
        if given is None and asked is not None:
            return named.options[option]
        value = check(option, given, Choice(*(row.options[option] for row in rows)))
        if asked is not None and value != named.options[option]:
            other = next(row for row in rows if row.options[option] == value)
            raise ConfigurationError(
                f"{asked!r} was asked for with {option}={given!r}. Ask for {other.name!r}, or leave it out."
            )
        return value
