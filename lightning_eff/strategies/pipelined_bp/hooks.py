"""Where Lightning's loop is changed for a pipeline: each change is one attribute of one instance, undone at the end."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_eff.errors import ConfigurationError
from lightning_eff.runtime.patches import Undo, replaced
from lightning_eff.strategies.pipelined_bp.weights import Weights

_SAMPLED = 64
"""Elements of a tensor that its fingerprint is made of."""


@contextlib.contextmanager
def own_step(optimizer: torch.optim.Optimizer, update: Callable[[Callable[[], Any]], None]) -> Iterator[None]:
    """Within, ``optimizer.step(closure)`` runs the closure, then ``update`` with the optimizer's own step.

    The closure is Lightning's: forward, backward, hooks and clipping.
    """
    original = optimizer.step

    def step(closure: Callable[[], Any]) -> Any:
        result = closure()
        update(original)
        return result

    undo = replaced(optimizer, "step", step)
    try:
        yield
    finally:
        undo()


class SchedulerSteps:
    """Learning rates change for the same sample on every stage.

    Lightning steps schedulers after a batch. On an early stage the update of that batch is still to come, and the
    scheduler waits for it.
    """

    def __init__(self, model: Any, weights: Callable[[], Weights | None]) -> None:
        self._weights = weights
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._step = model.lr_scheduler_step
        self.undo = replaced(model, "lr_scheduler_step", self._later)

    def _later(self, scheduler: Any, metric: Any) -> None:
        weights = self._weights()
        due = 0 if weights is None else weights.samples
        self._waiting.append((due, lambda: self._step(scheduler, metric)))
        self.run_due()

    def run_due(self) -> None:
        """Step schedulers whose update has been made."""
        weights = self._weights()
        done = 0 if weights is None else weights.updates
        while self._waiting and self._waiting[0][0] <= done:
            self._waiting.popleft()[1]()


def at_epoch_end(trainer: Any, meet: Callable[[], None]) -> Undo:
    """Call ``meet`` when a training epoch ends, before anybody looks at its metrics."""
    connector = trainer._logger_connector
    end = type(connector).epoch_end_reached

    def epoch_end_reached() -> None:
        end(connector)
        if trainer.training:
            meet()

    return replaced(connector, "epoch_end_reached", epoch_end_reached)


def before_validation(trainer: Any, drain: Callable[[], None]) -> Undo:
    """Call ``drain`` when a validation begins, before a callback may exchange weights (EMA)."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    run = loop.run

    def drained(*args: Any, **kwargs: Any) -> Any:
        drain()
        return run(*args, **kwargs)

    return replaced(loop, "run", drained)


def clip_by_stage(plugin: Any, weights: Callable[[], Weights | None]) -> Undo:
    """Clip the gradients of every stage by themselves: those of other stages are of other samples."""
    clip = plugin.clip_gradients

    def clip_gradients(optimizer: Any, *args: Any, **kwargs: Any) -> None:
        ours, whole = weights(), optimizer.param_groups
        if ours is None or not (args[0] if args else kwargs.get("clip_val")):
            return
        for stage in ours.stages:
            if all(p.grad is None for p in stage.parameters):  # the pipeline fills; torch refuses to clip nothing
                continue
            optimizer.param_groups = [{**group, "params": own} for group, own in ours.groups(stage)]
            try:
                clip(optimizer, *args, **kwargs)
            finally:
                optimizer.param_groups = whole

    return replaced(plugin, "clip_gradients", clip_gradients)


def keep_metrics_local(model: nn.Module) -> Undo:
    """Torchmetrics would gather over all processes, of which one has the metric's values."""
    metrics = [m for m in model.modules() if hasattr(m, "distributed_available_fn")]
    undone = [replaced(m, "distributed_available_fn", lambda: False) for m in metrics]

    def undo() -> None:
        for put_back in undone:
            put_back()

    return undo


def with_batch_size(loader: Any, batch_size: int) -> Any:
    """The same loader with smaller batches.

    Raises:
        ConfigurationError: it is no DataLoader that makes batches, or its batches are smaller or not a multiple.
    """
    given = getattr(loader, "batch_size", None)
    if not isinstance(loader, torch.utils.data.DataLoader) or given is None:
        raise ConfigurationError(
            "micro_batch_size needs a torch DataLoader with batch_size=...; this one makes its batches in another way. "
            "Give it the micro-batches you want and leave micro_batch_size out."
        )
    if given % batch_size:
        raise ConfigurationError(f"micro_batch_size={batch_size} does not divide the loader's batch_size={given}.")
    if given == batch_size:
        return loader
    kept = (
        "dataset", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
        "generator", "prefetch_factor", "persistent_workers", "drop_last",
    )  # fmt: skip
    arguments = {name: getattr(loader, name) for name in kept}
    if not isinstance(loader.dataset, torch.utils.data.IterableDataset):  # that has an order of its own
        arguments["sampler"] = loader.sampler
    return torch.utils.data.DataLoader(batch_size=batch_size, **arguments)


def seed_workers_alike(loader: Any, root: str) -> Undo:
    """After ``seed_everything(workers=True)`` Lightning would seed the loader's workers differently on every rank."""
    if not int(os.environ.get("PL_SEED_WORKERS", "0")) or getattr(loader, "worker_init_fn", loader) is not None:
        return lambda: None
    fabric = "lightning_fabric" if root.startswith("pytorch_lightning") else "lightning.fabric"
    seeds = importlib.import_module(f"{fabric}.utilities.seed").pl_worker_init_function
    return replaced(loader, "worker_init_fn", functools.partial(seeds, rank=0))


@contextlib.contextmanager
def precision_unchanged(plugin: Any) -> Iterator[None]:
    """What quantised layers draw and observe within is not kept: rounding streams, predicted scales."""
    memories = getattr(plugin, "_memories", None)
    before = plugin.state_dict() if memories else None
    try:
        yield
    finally:
        if memories:
            plugin.load_state_dict(before)
            for memory in memories():
                memory.forget()


def fingerprint(batch: Any) -> int:
    """32 bits of a batch: shapes, dtypes and some elements of its tensors."""
    code = 0
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            some = leaf.detach().reshape(-1)[:: max(1, leaf.numel() // _SAMPLED)][:_SAMPLED].cpu().contiguous()
            code = zlib.crc32(f"{tuple(leaf.shape)} {leaf.dtype}".encode(), code)
            code = zlib.crc32(some.view(torch.uint8).numpy().tobytes(), code)
    return code


def decides_in_step(trainer: Any, step: int) -> bool:
    """Whether a checkpoint callback or a scheduler may look at metrics at the end of this training step."""
    every = [getattr(callback, "_every_n_train_steps", 0) for callback in trainer.checkpoint_callbacks]
    by_time = any(getattr(callback, "_train_time_interval", None) for callback in trainer.checkpoint_callbacks)
    plateau = any(config.reduce_on_plateau and config.interval == "step" for config in trainer.lr_scheduler_configs)
    return by_time or plateau or any(n > 0 and step % n == 0 for n in every)
