"""Contracts between siblings: what a strategy or a callback may ask of a precision plugin that it does not know.

Precision plugins, strategies and callbacks never import each other. What one needs of another is a protocol here, which
the other has by its methods alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

__all__ = ["FineTuned", "ScalePredictor"]


@runtime_checkable
class ScalePredictor(Protocol):
    """A precision plugin whose layers may predict their scales from the steps before; Lightning's own are none.

    Example:
        >>> from lightning_eff.precision import LUQPrecision
        >>> plugin = LUQPrecision(hindsight=0.1)
        >>> isinstance(plugin, ScalePredictor), plugin.predicts_scales()  # no model is converted yet
        (True, False)
    """

    def predicts_scales(self) -> bool:
        """Return whether any layer of the models that are converted now predicts a scale."""

    def unchanged(self) -> AbstractContextManager[None]:
        """Return a context within which the model may run and leave no trace: no rounding seed, no prediction."""


class FineTuned(Protocol):
    """A precision plugin that can train its last steps with quantised weights and everything else in high precision."""

    weights_only: bool
    """Whether it does so now."""

    def begin_fine_tuning(self) -> None:
        """Quantise the weights alone from now on."""

    def end_fine_tuning(self) -> None:
        """Quantise everything again from now on."""
