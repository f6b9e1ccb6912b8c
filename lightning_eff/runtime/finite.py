"""The stop before a non-finite gradient reaches a parameter, the same wherever gradients are looked at."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import nn

from lightning_eff.errors import EffWarning, NonFiniteGradientError

__all__ = ["FIND_OPERATION", "OnNonFinite", "find_nonfinite", "stop_if_broken"]

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


def find_nonfinite(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters whose gradient holds NaN or Inf; one sum of squares a gradient where none does."""
    present = [(p, p.grad) for p in parameters if p.grad is not None and p.grad.numel()]
    grads = [(p, g.coalesce().values() if g.is_sparse else g) for p, g in present]
    # The largest element would say the same, 20 times as slowly (CPU).
    if not grads or bool(torch.stack(torch._foreach_norm([g for _, g in grads])).isfinite().all()):
        return []
    return [p for p, g in grads if not bool(g.isfinite().all())]  # none: squares of finite numbers were too large


FIND_OPERATION = "; torch.autograd.set_detect_anomaly(True) names the operation"
"""Advice where the gradient comes from one backward pass of the whole model."""
