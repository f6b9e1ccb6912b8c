"""Lightning's private parts of a Trainer, a strategy and a module that are read or set once, outside the loop."""

from __future__ import annotations

from typing import Any

from lightning_eff.runtime.patches import Undo, replace_attribute

__all__ = [
    "forget_layer_sync",
    "is_compiled",
    "is_searching_learning_rate",
    "keep_samplers",
    "layer_sync_of",
]


def is_compiled(module: Any) -> bool:
    """Return whether ``torch.compile`` was called on the whole LightningModule."""
    return getattr(module, "_compiler_ctx", None) is not None


def is_searching_learning_rate(trainer: Any) -> bool:
    """Return whether Lightning is looking for a learning rate, a run of its own inside of the user's."""
    return any(type(callback).__name__ == "_LRCallback" for callback in trainer.callbacks)


def keep_samplers(trainer: Any) -> Undo:
    """Keep Lightning from putting a sampler of its own in, as it does for every DDPStrategy."""
    return replace_attribute(trainer._accelerator_connector, "use_distributed_sampler", False)


def layer_sync_of(strategy: Any) -> Any:
    """Return the plugin that makes SyncBatchNorm layers of a strategy's model, or None."""
    return getattr(strategy, "_layer_sync", None)


def forget_layer_sync(strategy: Any) -> None:
    """Let a strategy make no SyncBatchNorm layers."""
    strategy._layer_sync = None
