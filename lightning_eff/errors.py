"""Typed errors and warnings: what failed, where, what was given, what is allowed, what to do next.

Every error derives from :class:`EffError` and from the built-in family a caller would expect, so that
``except ValueError`` in an existing project keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EffError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigurationError(EffError, ValueError):
    """An argument is outside its allowed range, or two arguments contradict each other."""


class UnknownMethodError(ConfigurationError):
    """A method or precision name is not known."""


class UnsupportedCombinationError(EffError, ValueError):
    """Two settings were asked for together that are not known to be right together."""


class UnsupportedLayerError(EffError, RuntimeError):
    """A layer or an operation cannot run in the asked format."""


class NonFiniteGradientError(EffError, RuntimeError):
    """A gradient holds NaN or Inf; it was stopped before it reached a parameter."""


class RankLostError(EffError, RuntimeError):
    """A rank did not come to where all ranks had to meet, or was lost there."""


class CheckpointError(EffError, RuntimeError):
    """The state of a method in a checkpoint is damaged, of another version, or of another model.

    A RuntimeError, as torch's ``load_state_dict`` raises for weights that do not fit.
    """


class MissingDependencyError(EffError, ImportError):
    """An optional package is needed for what was asked."""


class InternalError(EffError, RuntimeError):
    """A promise between two parts of this package was broken; the fault is ours, and nothing was changed."""


class EffWarning(UserWarning):
    """Base of every warning this package issues."""


class NoEffectWarning(EffWarning):
    """A method was asked for and changed nothing in this run."""


class FallbackWarning(EffWarning):
    """A fast path is not available here and a slower one with the same numbers is used."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest allowed name, or an empty string.

    Args:
        given: what the user wrote.
        allowed: the valid names.

    Example:
        >>> nearest("luq5", ["luq4", "bf16-mixed"])
        " Did you mean 'luq4'?"
    """
    close = difflib.get_close_matches(given[:80], list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
