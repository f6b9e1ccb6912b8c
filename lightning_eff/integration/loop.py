"""What strategies change in Lightning's training loop for the length of a run: its hooks, its length, its meetings.

A rank may compute fewer micro-batches than another, so nothing may wait for a rank inside the micro-batch loop:
Lightning's look for SIGTERM on other ranks moves to the end of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lightning_eff.runtime.patches import Undo, replace_attribute

__all__ = [
    "add_steps",
    "call_at_epoch_end",
    "call_before_validation",
    "look_for_sigterm_once_per_window",
    "micro_batch_of_epoch",
]


def micro_batch_of_epoch(trainer: Any) -> int:
    """Return the number of the micro-batch that this rank is at, counted from 0 in every epoch."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready) - 1


def add_steps(trainer: Any, steps: int) -> None:
    """Add ``steps`` optimizer steps to the Trainer's ``max_steps``; fewer than 0 take some back."""
    trainer.fit_loop.epoch_loop.max_steps += steps


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

    return replace_attribute(loop, "_broadcast_sigterm_tensor", once_per_window)


def call_at_epoch_end(trainer: Any, then: Callable[[], None]) -> Undo:
    """Call ``then`` when a training epoch ends, before anybody looks at its metrics."""
    connector = trainer._logger_connector
    end = type(connector).epoch_end_reached

    def epoch_end_reached() -> None:
        end(connector)
        if trainer.training:
            then()

    return replace_attribute(connector, "epoch_end_reached", epoch_end_reached)


def call_before_validation(trainer: Any, first: Callable[[], None]) -> Undo:
    """Call ``first`` when a validation begins, before a callback may exchange weights (EMA)."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    run = loop.run

    def run_after_first(*args: Any, **kwargs: Any) -> Any:
        first()
        return run(*args, **kwargs)

    return replace_attribute(loop, "run", run_after_first)
