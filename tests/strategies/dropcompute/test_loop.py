"""strategy="dropcompute" around the loop: callbacks, several fits, epochs cut short, clocks, one device."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.errors import EffError
from tests.harness import run_ranks
from tests.strategies.dropcompute.plans import PLAN, SAMPLES, STEPS, M, planned, reference
from tests.strategies.models import (
    BATCH,
    NAMESPACES,
    data,
    loader,
    loss_of,
    net,
    ours,
    parameters_of,
    task,
    trainer,
)

# ---------------------------------------------------------------------------------------------------- around the loop


def _callbacks(rank: int, world: int, folder: str) -> dict[str, Any]:
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    best = ModelCheckpoint(folder, monitor="val_loss", filename="best-{step}", save_top_k=1)
    worse = EarlyStopping("rising", mode="min", patience=1)

    def on_validation_epoch_end(self: Any) -> None:
        self.log("rising", float(self.trainer.global_step), sync_dist=True)

    model = task(on_validation_epoch_end=on_validation_epoch_end)
    options: dict[str, Any] = {"val_check_interval": 0.5, "callbacks": [best, worse], "enable_checkpointing": True}
    runner = trainer(planned([row * 9 for row in PLAN]), accumulate_grad_batches=M, max_epochs=9, **options)
    runner.fit(model, loader(rank, world, SAMPLES), loader(rank, world, 4 * BATCH))
    stopped = runner.global_step
    fresh = task()
    found = {
        "validated": runner.validate(model, loader(rank, world, 4 * BATCH), verbose=False)[0]["val_loss"],
        "tested": runner.test(_with_test_step(), loader(rank, world, 4 * BATCH), verbose=False)[0]["test_loss"],
        "fresh": runner.validate(fresh, loader(rank, world, 4 * BATCH), verbose=False)[0]["val_loss"],
    }
    return {"stopped": stopped, "best": Path(best.best_model_path).name, "score": float(best.best_model_score), **found}


def _with_test_step() -> Any:
    def test_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", loss_of(self.net, batch[0]), sync_dist=True)

    return task(test_step=test_step)


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler`")
def test_validation_early_stopping_and_the_best_checkpoint(tmp_path: Path) -> None:
    first, second = run_ranks(_callbacks, 2, str(tmp_path), init_group=False)
    assert first == second
    assert first["stopped"] == 6, "steps 3 and 6 are validated, and the second is no better"
    assert first["best"] in ("best-step=3.ckpt", "best-step=6.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == [first["best"]]
    assert first["tested"] == first["fresh"] != first["validated"]


def _twice(rank: int, world: int) -> dict[str, Any]:
    model = task()
    strategy = planned([row * 2 for row in PLAN])
    runner = trainer(strategy, accumulate_grad_batches=M)
    runner.fit(model, loader(rank, world, SAMPLES))
    first = parameters_of(model.net)
    runner.fit_loop.max_epochs = 2
    runner.fit(model, loader(rank, world, SAMPLES))
    again = task()
    runner.fit_loop.max_epochs = 3
    strategy._steps = 0
    runner.fit(again, loader(rank, world, SAMPLES))
    return {
        "first": first,
        "steps": runner.global_step,
        "computed": len(model.computed),
        "again": parameters_of(again.net),
    }


def test_one_trainer_fits_more_than_once() -> None:
    for rank, result in enumerate(run_ranks(_twice, 2, init_group=False)):
        assert result["computed"] == 2 * sum(PLAN[rank])
        assert result["steps"] == 3 * STEPS
        assert (result["first"] - reference(PLAN)).norm() <= 2e-6 * reference(PLAN).norm()
        assert (result["again"] - reference(PLAN)).norm() <= 2e-6 * reference(PLAN).norm(), "nothing of the old model"


def _cut_short(rank: int, world: int) -> dict[str, Any]:
    """Epoch 0 ends in the middle of its third window; its last two micro-batches never reach the optimizer."""

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 0 and batch_idx == 2 * M + 2 else None

    model = task(on_train_batch_start=on_train_batch_start)
    plan = [[*row[:2], *row] for row in PLAN]
    strategy = planned(plan)
    runner = trainer(strategy, accumulate_grad_batches=M, max_epochs=2)
    runner.fit(model, loader(rank, world, SAMPLES))
    return {"weights": parameters_of(model.net), "steps": runner.global_step, "tally": strategy._tallies.total}


def test_an_epoch_cut_short_inside_a_window_leaves_nothing_behind() -> None:
    first, second = run_ranks(_cut_short, 2, init_group=False)
    assert torch.equal(first["weights"], second["weights"])
    assert first["steps"] == 2 + STEPS
    computed = sum(sum(row[:2]) + sum(row) for row in PLAN)
    assert (first["tally"].computed, first["tally"].dropped) == (computed, 2 * M * (2 + STEPS) - computed)
    expected = _two_epochs(PLAN)
    assert (first["weights"] - expected).norm() <= 2e-6 * expected.norm()


def _two_epochs(plan: list[list[int]]) -> Tensor:
    """Two steps of an epoch, then a whole epoch, in one process; the schedule moves at the early end as well."""
    model = net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
    batches = data(SAMPLES).double().split(BATCH)
    for place, step in enumerate([0, 1, *range(STEPS)]):
        if place == 2:
            schedule.step()
        optimizer.zero_grad()
        counts = [row[step] for row in plan]
        for rank in range(2):
            for m in range(counts[rank]):
                loss_of(model, batches[rank::2][step * M + m]).backward()
        for p in model.parameters():
            p.grad = p.grad / sum(counts)  # type: ignore[operator]
        optimizer.step()
        schedule.step()
    return parameters_of(model)


def _slow(rank: int, world: int, folder: str, what: str) -> list[int]:
    import time

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        if what == "validation":
            time.sleep(0.6)

    def on_train_batch_end(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if what == "checkpoint" and batch_idx % M == M - 1:
            self.trainer.save_checkpoint(Path(folder) / "slow.ckpt")
        if what == "data" and batch_idx % M == 0:
            time.sleep(0.6)

    model = task(validation_step=validation_step, on_train_batch_end=on_train_batch_end)
    strategy = ours(threshold=0.5, include_data_time=True)
    runner = trainer(strategy, accumulate_grad_batches=M, val_check_interval=M, num_sanity_val_steps=1)
    write = runner.strategy.checkpoint_io.save_checkpoint
    strategy.checkpoint_io.save_checkpoint = lambda *args, **options: (time.sleep(0.6), write(*args, **options))
    runner.fit(model, loader(rank, world, 2 * 2 * BATCH * M), loader(rank, world, 2 * BATCH))
    return [strategy._tallies.total.dropped, len(model.computed)]


@pytest.mark.parametrize("what", ["validation", "checkpoint", "data"])
def test_validation_and_checkpoints_are_not_compute_time(tmp_path: Path, what: str) -> None:
    """Not even where waiting for data is: the clock of a window stands still, on the ranks that wait as well."""
    first, second = run_ranks(_slow, 2, str(tmp_path), what, init_group=False)
    if what == "data":
        assert first == second == [2 * 2 * (M - 1), 2]
    else:
        assert first == second == [0, 2 * M]


def _lbfgs(self: Any) -> Any:
    return torch.optim.LBFGS(self.net.parameters(), lr=0.1, max_iter=3)


def _lbfgs_drops(rank: int, world: int) -> str:
    model = task(configure_optimizers=_lbfgs)
    model.unused = nn.Identity()
    try:
        trainer(planned(PLAN), accumulate_grad_batches=M).fit(model, loader(rank, world, SAMPLES))
    except EffError as error:
        return str(error)
    return ""


def test_an_optimizer_that_computes_the_loss_again_is_refused() -> None:
    for told in run_ranks(_lbfgs_drops, 2, init_group=False):
        assert "LBFGS" in told


def _measured(rank: int, world: int, kind: str) -> dict[str, Any]:
    import warnings

    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    strategy = ours(threshold="auto", warmup_steps=6, max_drop_rate=0.5, delay="slow:rank=1,factor=10")
    options: dict[str, Any] = {"accumulate_grad_batches": M, "max_epochs": 8, "limit_train_batches": M - 1}
    if kind == "changes":
        change = GradientAccumulationScheduler({0: 2, 1: 3})
        options = {"max_epochs": 3, "limit_train_batches": 12, "callbacks": [change]}
    until = []
    model = task(on_before_zero_grad=lambda self, _: until.append(strategy._search.measuring_until))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(strategy, **options).fit(model, loader(rank, world, SAMPLES))
    said = [str(warning.message) for warning in told if "measured nothing" in str(warning.message)]
    return {"threshold_s": strategy.threshold_s, "until": until, "said": said}


def test_a_threshold_is_measured_again_when_the_steps_change() -> None:
    """Six steps of two micro-batches, then eight of three: of the first six none counts, of the others six."""
    first, second = run_ranks(_measured, 2, "changes", init_group=False)
    assert first["until"] == second["until"]
    assert sorted(set(first["until"])) == [6, 13]
    assert 0 < first["threshold_s"] == second["threshold_s"] < math.inf
    assert not first["said"]


def test_a_measurement_without_a_full_step_is_told() -> None:
    for result in run_ranks(_measured, 2, "short", init_group=False):
        assert math.isinf(result["threshold_s"])
        assert len(result["said"]) == 1
        assert "accumulate_grad_batches=4" in result["said"][0]


# ---------------------------------------------------------------------------------------------------- one device


def _alone(rank: int, world: int, root: str) -> dict[str, Any]:
    strategies = importlib.import_module(f"{root}.strategies")
    options = {"devices": 1, "accumulate_grad_batches": M, "max_epochs": 2}
    weights = []
    for kind in ("ours", "stock", "drops", "none"):
        hooks: dict[str, Any] = {}
        if kind in ("drops", "none"):
            hooks["training_step"] = lambda self, batch, i, k=kind: (
                None if k == "none" and i % 3 else loss_of(self.net, batch[0])
            )
        home = "lightning_eff.strategies" if root == NAMESPACES[0] else "lightning_eff.pytorch_lightning"
        made = importlib.import_module(home).DropComputeStrategy
        threshold = 0.0 if kind == "drops" else math.inf
        strategy = strategies.DDPStrategy() if kind == "stock" else made(threshold=threshold)
        model = task(root, **hooks)
        model.unused = nn.Identity()
        runner = trainer(strategy, root, **options)
        runner.fit(model, loader(0, 1, SAMPLES // 2))
        assert runner.global_step == 2 * SAMPLES // 2 // BATCH // M
        weights.append(parameters_of(model.net))
    return {"weights": weights}


@pytest.mark.parametrize("root", NAMESPACES)
def test_one_device_is_enough(root: str) -> None:
    (result,) = run_ranks(_alone, 1, root, init_group=False)
    whole, stock_weights, drops, none = result["weights"]
    assert torch.equal(whole, stock_weights)
    assert not torch.equal(whole, drops)
    assert none.isfinite().all()
