"""Train the same task in several precisions with Lightning's Trainer and keep what a comparison needs."""

from __future__ import annotations

import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.tasks.saved import held_by_graph, quantisable, record_all, record_saved

__all__ = ["Run", "Task", "quiet", "step_seconds", "train"]

COUNTED_STEPS = 3  # the first step fills caches, the next two count memory; none of them is timed
Variants = Mapping[str, Callable[[], dict[str, Any]]]
"""Name -> Trainer arguments; a function, because a plugin instance belongs to one Trainer."""


@dataclass(frozen=True)
class Task:
    """Something to train.

    Attributes:
        name: title for tables and figures.
        metric: key the module logs in validation.
        build: seed -> LightningModule and data.
        epochs: passes over the data.
    """

    name: str
    metric: str
    build: Callable[[int], tuple[L.LightningModule, L.LightningDataModule]]
    epochs: int = 1


@dataclass
class Run:
    """What one training left behind.

    Attributes:
        losses: training loss of every step.
        metric: the task's validation metric at the end; NaN when it was not validated.
        step_s: seconds of every step.
        layer_bytes: activations that the quantisable layers keep for backward.
        model_bytes: everything the model keeps for backward, with copies of weights, without the parameters.
    """

    losses: list[float] = field(default_factory=list)
    metric: float = float("nan")
    step_s: list[float] = field(default_factory=list)
    layer_bytes: int = 0
    model_bytes: int = 0


class _Recorder(L.Callback):
    """Fills a :class:`Run`: counts memory in the second and third step, times those after."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.count = ExitStack()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        net = pl_module.net
        if trainer.global_step == 1:
            layers = [net.get_submodule(name) for name in quantisable(net)]
            self.saved = self.count.enter_context(record_saved(layers))
        elif trainer.global_step == 2:
            self.saved = self.count.enter_context(record_all(net))
        self.begin = _now()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if trainer.global_step == 1:
            self.run.layer_bytes = self.saved.activation_bytes
        elif trainer.global_step == 2:
            parameters = {parameter.untyped_storage().data_ptr(): 0 for parameter in pl_module.parameters()}
            kept = held_by_graph(loss) | self.saved.activations | parameters  # one entry per storage
            self.run.model_bytes = sum(kept.values())
        self.count.close()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > COUNTED_STEPS:
            self.run.step_s.append(_now() - self.begin)
        self.run.losses.append(float(outputs["loss"]))


def _now() -> float:
    """CPU time on one thread, which a busy neighbour cannot lengthen; wall time on several."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def quiet() -> None:
    """Keep Lightning's notices about devices and loader workers out of the output of many short runs."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


def train(task: Task, arguments: dict[str, Any], seed: int, *, max_steps: int | None = None, show: bool = False) -> Run:
    """Train ``task`` once and return what happened.

    Args:
        task: what to train.
        arguments: ``precision=`` or ``plugins=`` for the Trainer, and ``callbacks=`` beside the recorder.
        seed: decides initial weights, order of the data and stochastic rounding.
        max_steps: stop after this many steps and do not validate; for timing.
        show: let through what the precision prints, such as its table of converted layers.
    """
    L.seed_everything(seed, verbose=False)
    module, data = task.build(seed)
    run = Run()
    short = {} if max_steps is None else {"max_steps": max_steps, "limit_val_batches": 0}
    trainer = L.Trainer(
        max_epochs=task.epochs,
        check_val_every_n_epoch=task.epochs,
        num_sanity_val_steps=0,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**arguments, "callbacks": [_Recorder(run), *arguments.get("callbacks", ())]},
        **short,
    )
    with nullcontext() if show else redirect_stdout(io.StringIO()):
        trainer.fit(module, data)
    run.metric = float(trainer.callback_metrics.get(task.metric, float("nan")))
    return run


def step_seconds(task: Task, variants: Variants, *, rounds: int, steps: int) -> dict[str, list[float]]:
    """Return, for every variant, the median seconds per step of each round; the variants take turns.

    Training runs of minutes cannot be compared by their total time on a machine that does other things as well; short
    turns see the same good and bad moments.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, arguments in variants.items():
            run = train(task, arguments(), 0, max_steps=steps + COUNTED_STEPS)
            times[name].append(statistics.median(run.step_s))
    return times
