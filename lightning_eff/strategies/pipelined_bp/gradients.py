"""The stop before a non-finite gradient reaches the weights of a stage."""

from __future__ import annotations

from torch import nn

from lightning_eff.runtime.finite import OnNonFinite, find_nonfinite, stop_if_broken
from lightning_eff.strategies.pipelined_bp.weights import Weights

__all__ = ["check_gradients"]


def check_gradients(model: nn.Module, weights: Weights, *, rank: int, on_nonfinite: OnNonFinite) -> None:
    """Stop a NaN or Inf gradient before it reaches a parameter; every rank sees those of its own stages.

    Args:
        model: the whole model, which knows the names.
        weights: of this rank's stages.
        rank: of this process.
        on_nonfinite: the strategy's option.

    Raises:
        NonFiniteGradientError: unless ``on_nonfinite`` is "warn".
    """
    broken = {id(p) for p in find_nonfinite(weights.parameters)}
    if not broken:
        return
    stop_if_broken(
        "pipelined_bp",
        [name for name, p in model.named_parameters() if id(p) in broken],
        gradient=f"the gradient of micro-batch {weights.updates}",
        where=f"on rank {rank}",
        on_nonfinite=on_nonfinite,
        unchanged="No parameter of this rank's stages was changed by it",
        advice=" (with delays training is unstable earlier, see the method's card)",
    )
