"""What strategies change in Lightning's loop for the length of a run: its meetings of ranks, what it logs, its hooks.

A rank may compute fewer micro-batches than another, so nothing may wait for a rank inside the micro-batch loop:
Lightning's look for SIGTERM on other ranks moves to the end of a window. What a rank logged in a micro-batch another
may not have logged at all: that is found out before it is averaged.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lightning_eff.errors import UnsupportedCombinationError
from lightning_eff.runtime.patches import Undo, replaced

__all__ = ["compare_logs_between_ranks", "look_for_sigterm_once_per_window"]


def look_for_sigterm_once_per_window(trainer: Any) -> Undo:
    """Let Lightning ask for SIGTERM on other ranks once per optimizer step instead of once per micro-batch.

    Since 2.5.2 every micro-batch begins with a broadcast from rank 0; a straggler there makes all ranks wait.
    Lightning's own also passes over any error of that broadcast, and with it over a lost rank.
    """
    loop = trainer.fit_loop.epoch_loop
    ask = getattr(type(loop), "_broadcast_sigterm_tensor", None)
    if ask is None:
        return lambda: None

    def once_per_window() -> None:
        if loop.batch_progress.current.ready % trainer.accumulate_grad_batches:
            return
        received = torch.tensor([int(trainer.received_sigterm)], dtype=torch.int64, device=trainer.strategy.root_device)
        dist.broadcast(received, src=0)
        if int(received):
            ask(loop)  # on every rank: it raises what ends the run

    return replaced(loop, "_broadcast_sigterm_tensor", once_per_window)


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

    return replaced(connector, "epoch_end_reached", compare_first)


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
    """Whether Lightning, or a metric object itself, goes to the other ranks for it."""
    sync = value.meta.sync
    return not value.is_tensor or (sync.should and not sync.rank_zero_only)
