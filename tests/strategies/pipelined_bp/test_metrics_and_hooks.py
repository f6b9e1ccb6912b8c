"""Metrics, hooks and callbacks of a pipeline have the values, and run as often, as in plain Lightning."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as known  # draws random numbers when it is imported: before any run
from torch import Tensor
from torch.nn import functional as F

from tests.harness import run_ranks
from tests.strategies.pipelined_bp.models import (
    CUTS,
    EPOCH,
    STEPS,
    bits,
    loader,
    strategy,
    task,
    trainer,
    val_loader,
)


def _metrics(rank: int, world: int) -> dict[str, Any]:
    import torchmetrics

    seen: list[tuple[Tensor, Tensor]] = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        out = self(batch[0])
        self.train_accuracy(out, batch[1])
        seen.append((out.detach().argmax(1), batch[1]))
        self.log("train_accuracy", self.train_accuracy, on_step=True, on_epoch=True)
        return F.cross_entropy(out, batch[1])

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        out = self(batch[0])
        self.log("val_loss", F.cross_entropy(out, batch[1]), sync_dist=True)
        self.val_metrics.update(out, batch[1])
        self.log_dict(self.val_metrics, on_step=False, on_epoch=True)

    model = task(hooks={"training_step": training_step, "validation_step": validation_step})
    many = {"task": "multiclass", "num_classes": 3}
    model.train_accuracy = torchmetrics.Accuracy(**many)
    model.val_metrics = torchmetrics.MetricCollection([torchmetrics.Accuracy(**many)], prefix="val_")
    run = trainer(strategy(stages=CUTS[2]), devices=world, val_check_interval=1.0)
    run.fit(model, loader(), val_loader())
    hits = [(guess == label).float() for guess, label in seen[-EPOCH:]]  # the last stage's
    x, y = (torch.cat(part) for part in zip(*val_loader(), strict=True))
    with torch.no_grad():
        right = float((model(x).argmax(1) == y).float().mean())
    metrics = [model.train_accuracy, *model.val_metrics.values()]
    return {
        "logged": {k: float(v) for k, v in run.callback_metrics.items()},
        "hits": float(torch.cat(hits).mean()) if hits else None,
        "right": right,
        "synced": [m.distributed_available_fn is not None and m.distributed_available_fn() for m in metrics],
    }


def test_torchmetrics_objects_have_the_values_of_one_replica() -> None:
    first, second = run_ranks(_metrics, 2, init_group=False)
    assert first["logged"]["train_accuracy_epoch"] == pytest.approx(first["hits"], rel=1e-6)
    for told in (first, second):
        assert told["logged"]["val_MulticlassAccuracy"] == pytest.approx(first["right"], rel=1e-6)
        assert all(told["synced"]), "after fit they gather over ranks again"
    # What the last stage alone knows, callbacks on the others see as well.
    assert second["logged"]["train_accuracy_epoch"] == first["logged"]["train_accuracy_epoch"]
    assert run_ranks(_metrics, 1, init_group=False)[0]["logged"] == first["logged"]


COUNTED = (
    "on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
    "on_before_zero_grad", "on_train_batch_end", "on_validation_epoch_end", "on_train_epoch_end",
)  # fmt: skip


def _hooks(rank: int, world: int, plain: bool) -> dict[str, int]:
    counts: Counter[str] = Counter()

    def counted(name: str) -> Any:
        return lambda self, *_, **__: counts.update([name])

    counting = type("Counting", (known.Callback,), {name: counted(name) for name in COUNTED})()
    used = "auto" if plain else strategy(stages=CUTS[max(world, 2)])
    trainer(used, devices=world, callbacks=[counting]).fit(task(), loader(), val_loader())
    return dict(counts)


def test_hooks_run_as_often_as_in_plain_lightning() -> None:
    """On the last stage. On an early one there is no loss, and updates under way are made where a validation begins."""
    (plain,) = run_ranks(_hooks, 1, True, init_group=False)
    assert run_ranks(_hooks, 1, False, init_group=False) == [plain]
    last, first = run_ranks(_hooks, 2, False, init_group=False)
    assert last == plain
    drained = 2 * plain["on_validation_epoch_end"]
    other = {"on_after_backward": STEPS - drained, "on_before_optimizer_step": STEPS + drained}
    assert first == {**{k: v for k, v in plain.items() if k != "on_before_backward"}, **other}


def _whole_model_at(rank: int, world: int) -> list[Any]:
    seen: list[Any] = []
    looks = lambda self, _, module: seen.append(bits(dict(module.state_dict())))  # noqa: E731
    hooks = ("on_train_epoch_end", "on_validation_epoch_start", "on_validation_end", "on_train_end")
    looking = type("Looking", (known.Callback,), dict.fromkeys(hooks, looks))()
    run = trainer(strategy(stages=CUTS[3]), devices=world, callbacks=[looking])
    run.fit(task(norm="batch"), loader(), val_loader())
    return seen


def test_callbacks_see_the_whole_model_where_an_epoch_or_a_validation_ends() -> None:
    (one,) = run_ranks(_whole_model_at, 1, init_group=False)
    assert len(one) == 2 + 2 * 4 + 1
    for seen in run_ranks(_whole_model_at, 3, init_group=False):
        assert seen == one
