"""strategy="pipelined_bp" inside Lightning: callbacks, metrics, precisions and what else goes on, as in one process.

In one process (the emulation) everything Lightning does is plain; so two ranks are compared with it, to the bit.
"""

from __future__ import annotations

import copy
import datetime as dt
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as known  # draws random numbers when it is imported: before any run
from torch import Tensor, nn
from torch.nn import functional as F

from tests.harness import RanksFailedError, run_ranks
from tests.strategies.pipelined_bp.models import (
    CUTS,
    STEPS,
    Outcome,
    bits,
    differences,
    loader,
    outcome_of,
    strategy,
    task,
    trainer,
)

EPOCH = STEPS // 2
VALIDATION = (10, 2)
"""Samples and seed of the validation set."""


def val_loader() -> Any:
    return loader(VALIDATION[0], seed=VALIDATION[1], shuffle=False)


# ---------------------------------------------------------------------------------------------------- as in one process


def callbacks(name: str, folder: str) -> list[Any]:
    """What a scenario calls ``name``; made on the rank."""
    no_better = {"patience": 1, "min_delta": 10.0}
    every = {"dirpath": folder, "save_top_k": -1, "filename": "{epoch}-{step}-{loss_step:.3f}"}
    made: dict[str, Callable[[], Any]] = {
        "stop by loss_epoch": lambda: known.EarlyStopping("loss_epoch", check_on_train_epoch_end=True, **no_better),
        "stop by val_loss": lambda: known.EarlyStopping("val_loss", **no_better),
        "save by loss_step": lambda: known.ModelCheckpoint(monitor="loss_step", every_n_train_steps=3, **every),
        "save by loss_epoch": lambda: known.ModelCheckpoint(
            monitor="loss_epoch", save_on_train_epoch_end=True, **every
        ),
        "save by val_loss": lambda: known.ModelCheckpoint(monitor="val_loss", save_last=True, **every),
        "save by loss_step after validation": lambda: known.ModelCheckpoint(monitor="loss_step", **every),
        "save by time": lambda: known.ModelCheckpoint(
            monitor="loss_step", train_time_interval=dt.timedelta(microseconds=1), **every
        ),
        "swa": lambda: known.StochasticWeightAveraging(0.01, swa_epoch_start=1),
        "tqdm": known.TQDMProgressBar,
        "rich": known.RichProgressBar,
    }
    return [made[name]()] if name in made else []


def plateau_by_step(self: Any) -> Any:
    optimizer = torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2, factor=0.9, threshold=10.0)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "monitor": "loss_step", "interval": "step"},
    }


def freeze(self: Any) -> None:
    for name in ("0", "4"):
        self.net.get_submodule(name).requires_grad_(False)


def unfreeze(self: Any) -> None:
    if self.current_epoch == 1:
        self.requires_grad_(True)


def logs_everywhere(self: Any, batch: Any, batch_idx: int) -> Any:
    loss = F.cross_entropy(self(batch[0]), batch[1])
    self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True, prog_bar=True, logger=True)
    self.log("largest", loss, on_epoch=True, reduce_fx="max")
    return loss


def averages(self: Any, outputs: Any, *_: Any) -> None:
    """An exponential moving average of a user's own, exchanged for the weights while validation runs."""
    self.losses.append(float(outputs["loss"]))
    self.average = getattr(self, "average", [p.detach().clone() for p in self.parameters()])
    for mean, p in zip(self.average, self.parameters(), strict=True):
        mean.lerp_(p.detach(), 0.5)


def averages_in(self: Any) -> None:
    self.kept = [p.detach().clone() for p in self.parameters()]
    for mean, p in zip(self.average, self.parameters(), strict=True):
        p.data.copy_(mean)


def averages_out(self: Any) -> None:
    for kept, p in zip(self.kept, self.parameters(), strict=True):
        p.data.copy_(kept)


def fp8() -> dict[str, Any]:
    from lightning_eff.precision import FP8Precision

    return {"plugins": [FP8Precision(scaling="rowwise", filter_slow=False)]}


BY_STEPS = {"enable_checkpointing": True}
SCENARIOS: dict[str, dict[str, Any]] = {
    "stop by loss_epoch": {"options": {"max_epochs": 5}, "steps": 2 * EPOCH},
    "stop by val_loss": {"options": {"max_epochs": 5}, "steps": EPOCH},
    "save by loss_step": {"options": BY_STEPS},
    "save by loss_epoch": {"options": BY_STEPS},
    "save by val_loss": {"options": BY_STEPS},
    "save by loss_step after validation": {"options": BY_STEPS},
    "save by time": {"options": BY_STEPS},
    "swa": {"options": {"max_epochs": 3}, "model": {"norm": "group"}, "steps": 3 * EPOCH},
    "tqdm": {"options": {"enable_progress_bar": True}, "model": {"hooks": {"training_step": logs_everywhere}}},
    "rich": {"options": {"enable_progress_bar": True}},
    "plateau by step": {"model": {"hooks": {"configure_optimizers": plateau_by_step}}},
    "max_steps": {"options": {"max_steps": 7, "max_epochs": -1}, "steps": 7},
    "limit_train_batches": {"options": {"limit_train_batches": 3}, "steps": 6},
    "fewer batches than the delay": {"options": {"limit_train_batches": 1}, "steps": 2},
    "overfit_batches": {"options": {"overfit_batches": 2}, "steps": 4},
    "fast_dev_run": {"options": {"fast_dev_run": True}, "steps": 1},
    "sanity": {"options": {"num_sanity_val_steps": 2}},
    "clip by norm": {"options": {"gradient_clip_val": 0.1}},
    "clip by value": {"options": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}},
    "frozen layers": {"model": {"hooks": {"on_fit_start": freeze}}},
    "micro_batch_size": {"plan": {"micro_batch_size": 2}, "steps": 38},
    "anomaly": {"options": {"detect_anomaly": True}},
    "bf16-mixed": {"options": {"precision": "bf16-mixed"}},
    "bf16-true": {"options": {"precision": "bf16-true"}},
    "bf16-split": {"options": {"precision": "bf16-split"}},
    "bf16-kahan": {"options": {"precision": "bf16-kahan"}},
    "dfp16": {"options": {"precision": "dfp16"}},
    "fp8-rowwise": {"options": fp8},
}
LONGER = (
    "anomaly", "rich", "sanity", "bf16-kahan", "save by loss_epoch", "save by val_loss", "save by time", "tqdm",
    "limit_train_batches", "overfit_batches", "clip by value", "bf16-true", "bf16-split", "max_steps",
    "stop by val_loss", "save by loss_step", "plateau by step", "fast_dev_run", "fp8-rowwise", "swa",
)  # fmt: skip


def _scenario(rank: int, world: int, folder: str, name: str, given: dict[str, Any]) -> Outcome:
    scenario = {"steps": STEPS, "plan": {}, "model": {}, "options": {}, **SCENARIOS.get(name, {}), **given}
    options = scenario["options"]() if callable(scenario["options"]) else scenario["options"]
    extra = callbacks(name, folder)
    model = task(**{"dropout": 0.2, "norm": "batch", **scenario["model"]})
    model.on_train_end = lambda: converted.extend(getattr(run.precision_plugin, "_conversions", {}).values())
    converted: list[Any] = []
    run = trainer(strategy(stages=CUTS[2], **scenario["plan"]), devices=world, callbacks=extra, **options)
    run.fit(model, loader(), val_loader())
    outcome = outcome_of(model, run)
    outcome.extra = {
        "logged": {k: float(v) for k, v in run.callback_metrics.items()},
        "saved": sorted(Path(path).name for path in getattr(run.checkpoint_callback, "best_k_models", {})),
        "best": bits(getattr(run.checkpoint_callback, "best_model_score", None)),
        "converted": sum(conversion.layers for _, conversion in converted),
    }
    return outcome


def scenario(folder: Path, ranks: int, name: str, **given: Any) -> list[Outcome]:
    return run_ranks(_scenario, ranks, str(folder / str(ranks)), name, given, init_group=False)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in LONGER else []) for name in SCENARIOS]
)
def test_two_ranks_are_as_one_process(tmp_path: Path, name: str) -> None:
    real, (one,) = scenario(tmp_path, 2, name), scenario(tmp_path, 1, name)
    assert differences(real, one) == []
    assert one.trainer["global_step"] == SCENARIOS[name].get("steps", STEPS)
    for outcome in real:
        assert outcome.extra["saved"] == one.extra["saved"]
        assert outcome.extra["best"] == one.extra["best"]
    if name in ("dfp16", "fp8-rowwise"):
        assert one.extra["converted"] > 0
    if name.startswith("save"):
        assert one.extra["saved"]
        assert sorted(path.name for path in (tmp_path / "2").glob("*.ckpt")) == sorted(
            path.name for path in (tmp_path / "1").glob("*.ckpt")
        )


@pytest.mark.parametrize("precision", ["luq4", "bf16-sr"])
def test_precisions_that_round_by_rank_train(tmp_path: Path, precision: str) -> None:
    """Their streams are each rank's own, so that the bits are not those of one process."""
    real = scenario(tmp_path, 2, precision, options={"precision": precision, "max_epochs": 4}, steps=2 * STEPS)
    assert bits(real[0].state) == bits(real[1].state)
    assert all(bool(value.isfinite().all()) for value in real[0].state.values())
    assert sum(real[0].losses[-EPOCH:]) < 0.9 * sum(real[0].losses[:EPOCH])
    assert real[0].trainer["global_step"] == 2 * STEPS


def test_a_users_average_does_not_change_the_run(tmp_path: Path) -> None:
    """Weights that a callback exchanges while validation runs are not those that updates under way are made to."""
    hooks = {"on_train_batch_end": averages, "on_validation_start": averages_in, "on_validation_end": averages_out}
    plain, averaged = scenario(tmp_path, 2, "plain"), scenario(tmp_path, 2, "plain", model={"hooks": hooks})
    for without, with_it in zip(plain, averaged, strict=True):
        assert bits(with_it.state) == bits(without.state)
        assert with_it.losses == without.losses
        assert with_it.extra["logged"]["val_loss"] != without.extra["logged"]["val_loss"]


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any], str]] = {
    "EMA": (lambda: {"callbacks": [known.EMAWeightAveraging()]}, {}, "EMAWeightAveraging"),
    "SWA and BatchNorm": (
        lambda: {"callbacks": [known.StochasticWeightAveraging(0.01)]}, {"norm": "batch"}, "BatchNorm"
    ),
    "accumulation by epoch": (
        lambda: {"callbacks": [known.GradientAccumulationScheduler({1: 2})]}, {}, "GradientAccumulationScheduler"
    ),
    "predicted scales": (lambda: {"precision": "flexpoint16"}, {}, "flexpoint16"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_callbacks_that_a_pipeline_would_break_are_refused(name: str) -> None:
    with pytest.raises(RanksFailedError) as failed:
        run_ranks(_refused, 2, name, init_group=False)
    assert failed.value.failures == dict.fromkeys(range(2), "UnsupportedCombinationError")
    assert REFUSED[name][2] in str(failed.value)


def _never(*_: Any) -> None:
    raise AssertionError("training had begun")


def _refused(rank: int, world: int, name: str) -> None:
    options, model, _ = REFUSED[name]
    built = task(**model, hooks={"training_step": _never})
    trainer(strategy(stages=CUTS[2]), devices=world, **options()).fit(built, loader(), val_loader())


@pytest.mark.parametrize("ranks", [1, 2])
def test_unfreezing_in_a_run_is_refused(tmp_path: Path, ranks: int) -> None:
    """A stage trains what was trained when it was cut; what is added later would stay as it is."""
    with pytest.raises(RanksFailedError) as failed:
        scenario(tmp_path, ranks, "x", model={"hooks": {"on_fit_start": freeze, "on_train_epoch_start": unfreeze}})
    assert failed.value.failures == dict.fromkeys(range(ranks), "UnsupportedCombinationError")
    assert "unfreezes" in str(failed.value)


# ---------------------------------------------------------------------------------------------------- metrics and hooks


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


# ---------------------------------------------------------------------------------------------------- before and after


def own_attributes(model: nn.Module, run: Any) -> dict[str, list[str]]:
    """Names of what each object has of its own: something that was put over a method would be among it."""
    loop = run.fit_loop.epoch_loop
    objects = {name or "model": module for name, module in model.named_modules()}
    objects |= {"connector": run._logger_connector, "validation": loop.val_loop, "precision": run.precision_plugin}
    objects |= {"accelerator": run._accelerator_connector, "optimizer": run.optimizers[0] if run.optimizers else run}
    methods = {"forward", "log", "log_dict", "run", "epoch_end_reached", "clip_gradients", "lr_scheduler_step"}
    return {name: sorted(methods & set(vars(o))) for name, o in objects.items() if methods & set(vars(o))}


def _afterwards(rank: int, world: int, folder: str) -> dict[str, Any]:
    model, x = task(norm="batch", dropout=0.2), torch.ones(2, 6)
    run = trainer(strategy(stages=CUTS[2]), devices=world, gradient_clip_val=1.0)
    before = own_attributes(model, run)
    run.fit(model, loader(), val_loader())
    whole = bits(dict(model.state_dict()))
    path = Path(folder) / f"{rank}.pt"
    torch.save(model.state_dict(), path)
    other = task(norm="batch", dropout=0.2)
    other.load_state_dict(torch.load(path, weights_only=True))
    run.save_checkpoint(Path(folder) / "after.ckpt")
    found = {
        "patched": own_attributes(model, run) != before,
        "state": whole,
        "same output": torch.equal(model.eval()(x), other.eval()(x)),
        "copied": bits(dict(copy.deepcopy(model.train()).state_dict())) == whole,
        "trains": bool(model(x).sum().backward() or all(p.grad is not None for p in model.parameters())),
        "connector": run._accelerator_connector.use_distributed_sampler,
    }
    run.fit_loop.max_epochs = 4
    run.fit(model, loader(), val_loader())  # the same Trainer, with new optimizers
    again = trainer(strategy(stages=["net.5"], mitigation="stash"), devices=world)
    again.fit(model, loader(), val_loader())
    return {**found, "later": bits(dict(model.state_dict())), "steps": (run.global_step, again.global_step)}


def test_after_a_run_the_model_is_whole_and_nothing_is_left_behind(tmp_path: Path) -> None:
    """And it trains on, with the same Trainer and with another one that cuts elsewhere, as in one process."""
    (one,) = run_ranks(_afterwards, 1, str(tmp_path), init_group=False)
    for found in run_ranks(_afterwards, 2, str(tmp_path), init_group=False):
        assert found == one
    assert one["patched"] is False
    assert one["same output"] is one["copied"] is one["trains"] is one["connector"] is True
    assert one["steps"] == (2 * STEPS, STEPS)
    assert len(torch.load(tmp_path / "after.ckpt", weights_only=True)["optimizer_states"][0]["state"]) == 28
