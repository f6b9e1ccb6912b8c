"""What ranks have logged: compared before Lightning averages it, kept on one rank, or given to all.

Under dropcompute a rank may have dropped the micro-batch in which another logged a value; under a pipeline one rank
alone has the loss. Lightning supposes that all ranks log the same.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from lightning_eff.errors import UnsupportedCombinationError
from lightning_eff.runtime.patches import Undo, join_undos, replace_attribute
from lightning_eff.runtime.ranks import rank

__all__ = ["broadcast_logged_metrics", "compare_logs_between_ranks", "keep_metrics_local", "reads_metrics_at"]


def compare_logs_between_ranks(trainer: Any, method: str) -> Undo:
    """At the end of an epoch, make sure that all ranks have logged the same values before Lightning averages them.

    Lightning takes the mean over the ranks of one value after the other, in the order in which they were first logged.
    A value that a rank logs only in micro-batches it has dropped would make the others wait for it for ever, and
    another order would mix the values up. One small message per epoch.

    Raises:
        UnsupportedCombinationError: at the end of the epoch, on every rank, if a value is missing on one of them.
    """
    connector = trainer._logger_connector
    end = type(connector).epoch_end_reached

    def compare_first() -> None:
        if trainer.training:
            _bring_in_one_order(trainer.fit_loop._results, method)
        end(connector)

    return replace_attribute(connector, "epoch_end_reached", compare_first)


def _bring_in_one_order(results: Any, method: str) -> None:
    own = [key for key, value in results.valid_items() if value.meta.on_epoch and _is_averaged(value)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    for key in sorted(set().union(*everyone)):
        if without := [rank for rank, keys in enumerate(everyone) if key not in keys]:
            hook, _, name = key.partition(".")
            raise UnsupportedCombinationError(
                f"self.log({name!r}, ...) in {hook} was called on other ranks in this epoch and never on rank "
                f"{without[0]}, which under {method!r} may have dropped those micro-batches; its mean over the ranks "
                "cannot be taken. Log it in every micro-batch, or with sync_dist=False."
            )
    if any(keys != own for keys in everyone):
        for key in everyone[0]:
            results[key] = results.pop(key)


def _is_averaged(value: Any) -> bool:
    """Return whether Lightning, or a metric object itself, goes to the other ranks for the value."""
    sync = value.meta.sync
    return not value.is_tensor or (sync.should and not sync.rank_zero_only)


def broadcast_logged_metrics(trainer: Any) -> None:
    """Give every rank what rank 0 has logged, for callbacks that decide by it."""
    metrics = [{k: v.detach().cpu() if hasattr(v, "detach") else v for k, v in trainer.callback_metrics.items()}]
    dist.broadcast_object_list(metrics, src=0)
    if rank() != 0:
        trainer._logger_connector._callback_metrics.update(metrics[0])


def keep_metrics_local(model: nn.Module) -> Undo:
    """Keep torchmetrics from gathering over all processes, of which one alone has the metric's values."""
    metrics = [module for module in model.modules() if hasattr(module, "distributed_available_fn")]
    return join_undos(replace_attribute(metric, "distributed_available_fn", lambda: False) for metric in metrics)


def reads_metrics_at(trainer: Any, step: int) -> bool:
    """Return whether a checkpoint callback or a scheduler may look at metrics at the end of this training step."""
    every = [getattr(callback, "_every_n_train_steps", 0) for callback in trainer.checkpoint_callbacks]
    by_time = any(getattr(callback, "_train_time_interval", None) for callback in trainer.checkpoint_callbacks)
    plateau = any(config.reduce_on_plateau and config.interval == "step" for config in trainer.lr_scheduler_configs)
    return by_time or plateau or any(n > 0 and step % n == 0 for n in every)
