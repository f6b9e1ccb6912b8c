"""The stop before a non-finite gradient reaches a parameter, the same wherever gradients are looked at."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

from lightning_eff.errors import EffWarning, NonFiniteGradientError

__all__ = ["FIND_OPERATION", "OnNonFinite", "stop_if_broken"]

OnNonFinite = Literal["raise", "warn"]
SHOWN = 8
"""Parameters that are named."""


def stop_if_broken(
    method: str,
    broken: Sequence[str],
    *,
    where: str,
    on_nonfinite: OnNonFinite,
    of: int | None = None,
    gradient: str = "the gradient",
    unchanged: str = "No parameter was changed in this step",
    advice: str = "",
) -> None:
    """Stop a training step whose gradient is NaN or Inf before a parameter is changed, or warn.

    Args:
        method: who looked.
        broken: names of the parameters whose gradient is not finite; with none nothing happens.
        where: step, ranks, micro-batches that it comes from, for the message.
        on_nonfinite: ``"raise"`` or ``"warn"``.
        of: number of parameters that were looked at.
        gradient: which gradient, for the message.
        unchanged: what has not been changed, for the message.
        advice: more to do about it than to clip gradients, for the message.

    Raises:
        NonFiniteGradientError: a gradient is not finite, unless only a warning is wanted.
    """
    if not broken:
        return
    count = f"{len(broken)} of {of}" if of is not None else f"{len(broken)}"
    names = ", ".join(broken[:SHOWN]) + (" ..." if len(broken) > SHOWN else "")
    message = f"{method}: {gradient} is NaN or Inf {where} in {count} parameters: {names}. "
    if on_nonfinite == "raise":
        raise NonFiniteGradientError(
            f"{message}{unchanged}. Lower the learning rate or clip gradients{advice}; on_nonfinite='warn' goes on "
            "regardless."
        )
    warnings.warn(f"{message}The optimizer step goes on as asked.", EffWarning, stacklevel=3)


FIND_OPERATION = "; torch.autograd.set_detect_anomaly(True) names the operation"
"""Advice where the gradient comes from one backward pass of the whole model."""
