"""Refusals of dropcompute before the first step, and its warning where it changes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from lightning_eff.errors import ConfigurationError, NoEffectWarning, UnsupportedCombinationError
from lightning_eff.functional.stragglers.timings import check_target


def refuse_trainer(
    trainer: Any, *, layer_sync: Any, compensate: str | None = None, record_timings: str | None = None
) -> None:
    """Raise for what this Trainer asks for and dropcompute cannot do.

    Args:
        trainer: Lightning's.
        layer_sync: the plugin that makes SyncBatchNorm layers, or None.
        compensate: the strategy's option.
        record_timings: the strategy's option; rank 0 writes there.
    """
    if layer_sync is not None:
        raise UnsupportedCombinationError(
            "'dropcompute' cannot be combined with SyncBatchNorm: its forward pass waits for ranks that may have "
            "dropped the micro-batch. Use sync_batchnorm=False, or GroupNorm."
        )
    if not trainer.lightning_module.automatic_optimization:
        raise UnsupportedCombinationError(
            "'dropcompute' needs automatic optimization: it has to know where an optimizer step begins and ends. "
            "Remove self.automatic_optimization = False, or use strategy='ddp'."
        )
    if compensate and not trainer.max_steps > 0:
        raise ConfigurationError(
            "compensate='extra_steps' adds to max_steps, which is not set. Use Trainer(max_steps=...)."
        )
    if record_timings and trainer.is_global_zero:
        check_target(record_timings)
    kinds = {kind.__name__ for callback in trainer.callbacks for kind in type(callback).__mro__}
    if trainer.accumulate_grad_batches == 1 and "GradientAccumulationScheduler" not in kinds:
        warnings.warn(
            "dropcompute changes nothing with accumulate_grad_batches=1: a step of one micro-batch has none to "
            "drop. Split the batch, Trainer(accumulate_grad_batches=8) with an eighth of the batch size.",
            NoEffectWarning,
            stacklevel=3,
        )


def refuse_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise for optimizers whose steps are not one for each window of micro-batches."""
    if len(optimizers) > 1:
        raise UnsupportedCombinationError(
            f"'dropcompute' needs one optimizer and configure_optimizers returned {len(optimizers)}. Give one "
            "optimizer several parameter groups instead, or use strategy='ddp'."
        )
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise UnsupportedCombinationError(
            "'dropcompute' cannot be combined with LBFGS, which computes the loss several times in a step. Use "
            "another optimizer, or strategy='ddp'."
        )
