"""strategy="dropcompute" inside Lightning: hooks, logs, validation, callbacks, precisions, launches, both packages."""

from __future__ import annotations

import importlib
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.errors import EffError
from tests.harness import run_ranks
from tests.integration.conftest import reports, run_python
from tests.strategies.models import (
    BATCH,
    FEATURES,
    NAMESPACES,
    data,
    loader,
    loss_of,
    net,
    parameters_of,
    task,
    trainer,
)
from tests.strategies.test_dropcompute import PLAN, SAMPLES, STEPS, M, planned, reference

FULL = [[M] * STEPS] * 2
COUNTED = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_validation_epoch_end",
    "on_train_epoch_end",
)


def stock() -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    return DDPStrategy(process_group_backend="gloo")


def ours(**options: Any) -> Any:
    from lightning_eff.strategies import DropComputeStrategy

    return DropComputeStrategy(**{"threshold": math.inf, "process_group_backend": "gloo", **options})


def counting() -> Any:
    """A callback with the number of calls of each hook, and of each of the module's own."""
    from lightning.pytorch.callbacks import Callback

    counts: Counter[str] = Counter()

    def counted(name: str) -> Any:
        return lambda self, *_, **__: counts.update([name])

    made: Any = type("Counting", (Callback,), {name: counted(name) for name in COUNTED})()
    made.counts = counts
    return made


# ---------------------------------------------------------------------------------------------------- hooks and logs


def _hooks(rank: int, world: int, kind: str) -> dict[str, Any]:
    calls = counting()
    seen: list[float] = []
    kept: list[float] = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        loss = loss_of(self.net, batch[0])
        kept.append(float(loss.detach()))
        self.log("plain", loss, on_step=False, on_epoch=True)
        self.log("synced", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def on_before_optimizer_step(self: Any, optimizer: Any) -> None:
        seen.append(float(torch.cat([p.grad.reshape(-1) for p in self.net.parameters()]).norm()))

    model = task(training_step=training_step, on_before_optimizer_step=on_before_optimizer_step)
    if kind == "ddp":
        model.unused = nn.Identity()
    strategy = {"ddp": stock, "full": lambda: planned(FULL), "plan": lambda: planned(PLAN)}[kind]()
    runner = trainer(strategy, accumulate_grad_batches=M, callbacks=[calls], val_check_interval=8)
    runner.fit(model, loader(rank, world, SAMPLES), loader(rank, world, 2 * BATCH))
    return {
        "counts": dict(calls.counts),
        "norms": seen,
        "losses": kept,
        "plain": float(runner.callback_metrics["plain"]),
        "synced": float(runner.callback_metrics["synced"]),
        "val_loss": float(runner.callback_metrics["val_loss"]),
        "optimizer_steps": runner.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer_steps,
        "global_step": runner.global_step,
        "lr": runner.lr_scheduler_configs[0].scheduler.last_epoch,
    }


def test_hooks_run_as_often_and_see_what_stock_ddp_shows_them() -> None:
    for mine, theirs in zip(
        run_ranks(_hooks, 2, "full", init_group=False), run_ranks(_hooks, 2, "ddp", init_group=False), strict=True
    ):
        assert mine == theirs
        assert mine["counts"]["on_validation_epoch_end"] == 3


def test_hooks_and_logs_of_a_run_that_drops() -> None:
    results = run_ranks(_hooks, 2, "plan", init_group=False)
    everything = [loss for result in results for loss in result["losses"]]
    for rank, result in enumerate(results):
        computed, counts = sum(PLAN[rank]), result["counts"]
        assert counts["on_train_batch_start"] == counts["on_train_batch_end"] == M * STEPS
        assert counts["on_before_backward"] == counts["on_after_backward"] == computed == len(result["losses"])
        assert counts["on_before_optimizer_step"] == counts["on_before_zero_grad"] == STEPS
        assert result["global_step"] == result["optimizer_steps"] == result["lr"] == STEPS
        assert result["plain"] == pytest.approx(sum(result["losses"]) / computed, rel=1e-5)
        assert result["synced"] == pytest.approx(sum(everything) / len(everything), rel=1e-5)
        assert result["norms"] == pytest.approx(results[0]["norms"], rel=0), "of the summed gradient, on every rank"


def _logs_now_and_then(rank: int, world: int, places: dict[int, str]) -> dict[str, float] | str:
    """Log ``places[m]`` in micro-batch m of every window; later ones are dropped on rank 1."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        if name := places.get(batch_idx % M):
            self.log(name, float(ord(name)), on_step=False, on_epoch=True, sync_dist=True)
        return loss_of(self.net, batch[0])

    plan = [[M] * STEPS, [2] * STEPS]
    runner = trainer(planned(plan, timeout_s=5.0), accumulate_grad_batches=M)
    try:
        runner.fit(task(training_step=training_step), loader(rank, world, SAMPLES))
    except EffError as error:
        return str(error)
    return {name: float(value) for name, value in runner.callback_metrics.items()}


def test_a_log_that_one_rank_never_made_is_named() -> None:
    """Its mean over the ranks would wait for that rank for ever."""
    for told in run_ranks(_logs_now_and_then, 2, {0: "a", 3: "b"}, init_group=False, timeout_s=30.0):
        assert isinstance(told, str)
        assert "'b'" in told
        assert "rank 1" in told


def _logs_in_another_order(rank: int, world: int) -> dict[str, float]:
    """Rank 0 begins with "a", rank 1 with "b", as if it had dropped what came before; both log both."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        name = "ab"[(batch_idx + rank) % 2]
        self.log(name, float(ord(name)), on_step=False, on_epoch=True, sync_dist=True)
        if rank == 0:  # nobody waits for these
            self.log("own", 1.0, on_step=False, on_epoch=True, sync_dist=True, rank_zero_only=True)
        return loss_of(self.net, batch[0])

    runner = trainer(planned(FULL), accumulate_grad_batches=M)
    runner.fit(task(training_step=training_step), loader(rank, world, SAMPLES))
    return {name: float(runner.callback_metrics[name]) for name in "ab"}


def test_values_logged_in_another_order_are_not_mixed_up() -> None:
    expected = {"a": float(ord("a")), "b": float(ord("b"))}
    assert run_ranks(_logs_in_another_order, 2, init_group=False, timeout_s=30.0) == [expected] * 2


# ---------------------------------------------------------------------------------------------------- like stock DDP


class Normed(nn.Module):
    """Running statistics, and a buffer that no collective takes as it lies."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        self.register_buffer("table", torch.arange(12.0).view(4, 3).t())
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.first(x)).tanh())
        return out


def _freeze_by_turns(self: Any) -> None:
    """Epoch 0 trains the last layer, epoch 1 all, epoch 2 the last again."""
    for p in self.net[0].parameters():
        p.requires_grad = self.current_epoch == 1


def _frozen_at_first(self: Any) -> Any:
    for p in self.net[0].parameters():
        p.requires_grad = False
    return torch.optim.SGD([p for p in self.net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def _unfreeze(self: Any) -> None:
    """As BaseFinetuning does: a parameter group that was not there before."""
    if self.current_epoch == 1:
        for p in self.net[0].parameters():
            p.requires_grad = True
        self.optimizers().add_param_group({"params": list(self.net[0].parameters()), "lr": 0.05})


def _lbfgs(self: Any) -> Any:
    return torch.optim.LBFGS(self.net.parameters(), lr=0.1, max_iter=3)


def _two_losses(self: Any, batch: Any, batch_idx: int) -> dict[str, Any]:
    return {"loss": loss_of(self.net, batch[0]), "more": batch_idx}


SCENARIOS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip by norm": ({}, {"gradient_clip_val": 0.3}),
    "clip by value": ({}, {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}),
    "bf16-true": ({}, {"precision": "bf16-true"}),
    "schedule": ({}, {"accumulate_grad_batches": 1, "callbacks": "schedule", "max_epochs": 3}),
    "short epochs": ({}, {"limit_train_batches": 7}),
    "max_steps": ({}, {"max_steps": 8}),
    "dictionary": ({"training_step": _two_losses}, {}),
    "unfreeze": ({"configure_optimizers": _frozen_at_first, "on_train_epoch_start": _unfreeze}, {}),
    "freeze by turns": ({"on_train_epoch_start": _freeze_by_turns}, {"max_epochs": 3}),
    "one micro-batch": ({}, {"accumulate_grad_batches": 1}),
    "val in a window": ({}, {"val_check_interval": 6}),
}
LONGER = ("bf16-true", "dictionary", "max_steps", "one micro-batch")


def _like_stock(rank: int, world: int, name: str, normed: bool = False) -> list[dict[str, Any]]:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    results = []
    hooks, given = SCENARIOS.get(name, ({}, {}))
    for strategy in (ours(), _finding() if "free" in name else stock()):
        options = {"accumulate_grad_batches": M, "max_epochs": 2, **given}
        if options.get("callbacks") == "schedule":
            options["callbacks"] = [GradientAccumulationScheduler({0: 2, 1: 4, 2: 3})]
        model = task(**hooks)
        model.unused = nn.Identity()
        if normed:
            model.net = Normed()
        states: list[Tensor] = []
        model.on_before_zero_grad = lambda _, m=model, s=states: s.append(parameters_of(m))
        runner = trainer(strategy, **options)
        runner.fit(model, loader(rank, world, SAMPLES), loader(rank, world, 4 * BATCH))
        results.append(
            {
                "states": states,
                "weights": parameters_of(model),
                "buffers": [buffer.clone() for buffer in model.buffers()],
                "global_step": runner.global_step,
                "val_loss": float(runner.callback_metrics["val_loss"]),
            }
        )
    return results


def _finding() -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    return DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in LONGER else []) for name in SCENARIOS]
)
def test_without_dropping_it_is_stock_ddp_whatever_else_goes_on(name: str) -> None:
    for mine, theirs in run_ranks(_like_stock, 2, name, init_group=False):
        assert mine["global_step"] == theirs["global_step"] > 0
        assert mine["val_loss"] == theirs["val_loss"]
        assert torch.equal(mine["weights"], theirs["weights"])
        for first, second in zip(mine["states"], theirs["states"], strict=True):
            assert torch.equal(first, second)


def test_running_statistics_are_those_of_stock_ddp() -> None:
    """On rank 0, whose are saved; here the other ranks have them as well when the run ends."""
    results = run_ranks(_like_stock, 2, "plain", normed=True, init_group=False)
    (mine, theirs), (others, _) = results
    assert torch.equal(mine["weights"], theirs["weights"])
    assert len(mine["buffers"]) == 5
    for buffer, stock_buffer, other in zip(mine["buffers"], theirs["buffers"], others["buffers"], strict=True):
        assert torch.equal(buffer, stock_buffer)
        assert torch.equal(buffer, other)
    assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=0.2), "rank 1 validated with its own there"


def _three(rank: int, world: int, kind: str) -> Tensor:
    model = task()
    model.unused = nn.Identity()
    runner = trainer({"ours": ours, "ddp": stock}[kind](), devices=3, accumulate_grad_batches=M)
    runner.fit(model, loader(rank, world, 3 * BATCH * M * STEPS))
    return parameters_of(model.net)


@pytest.mark.long
def test_three_ranks_are_ddp_but_for_rounding() -> None:
    mine, theirs = (run_ranks(_three, 3, kind, init_group=False) for kind in ("ours", "ddp"))
    assert all(torch.equal(mine[0], other) for other in mine)
    assert (mine[0] - theirs[0]).norm() <= 1e-6 * theirs[0].norm()


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
    return {"weights": parameters_of(model.net), "steps": runner.global_step, "tally": strategy._total}


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
    return [strategy._total.dropped, len(model.computed)]


@pytest.mark.parametrize("what", ["validation", "checkpoint", "data"])
def test_validation_and_checkpoints_are_not_compute_time(tmp_path: Path, what: str) -> None:
    """Not even where waiting for data is: the clock of a window stands still, on the ranks that wait as well."""
    first, second = run_ranks(_slow, 2, str(tmp_path), what, init_group=False)
    if what == "data":
        assert first == second == [2 * 2 * (M - 1), 2]
    else:
        assert first == second == [0, 2 * M]


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
    model = task(on_before_zero_grad=lambda self, _: until.append(strategy._measuring_until))
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


# ---------------------------------------------------------------------------------------------------- LightningCLI

YAMLS = {
    "string": "trainer:\n  strategy: dropcompute\n",
    "class": (
        "trainer:\n  strategy:\n    class_path: {home}.DropComputeStrategy\n    init_args:\n"
        "      threshold: {threshold}\n      warmup_steps: 10\n      normalize: maximum\n"
        "      delay: stall:p=0.1,factor=3\n      process_group_backend: gloo\n      timeout_s: 60\n"
    ),
}


def _cli(root: str, text: str, folder: Path) -> Any:
    module = importlib.import_module(f"{root}.cli")
    boring = importlib.import_module(f"{root}.demos.boring_classes").BoringModel
    (folder / "config.yaml").write_text(text)
    defaults = {"accelerator": "cpu", "devices": 2, "logger": False, "enable_checkpointing": False}
    return module.LightningCLI(
        boring, run=False, args=[f"--config={folder / 'config.yaml'}"], trainer_defaults=defaults
    )


@pytest.mark.parametrize("root", NAMESPACES)
def test_yaml_with_the_string(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py"])
    app = _cli(root, YAMLS["string"], tmp_path)
    assert type(app.trainer.strategy).__name__ == "DropComputeStrategy"
    assert app.trainer.strategy.threshold == "auto"
    assert "strategy: dropcompute\n" in app.parser.dump(app.config)


@pytest.mark.parametrize("root", NAMESPACES)
@pytest.mark.parametrize(("written", "read"), [("auto", "auto"), ("0.25", 0.25), ("2", 2.0), (".inf", math.inf)])
def test_yaml_with_the_class(
    root: str, written: str, read: str | float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_eff.functional.delays import StallDelay

    monkeypatch.setattr(sys, "argv", ["app.py"])
    home = "lightning_eff.strategies" if root == NAMESPACES[0] else "lightning_eff.pytorch_lightning"
    text = YAMLS["class"].format(home=home, threshold=written)
    strategy = _cli(root, text, tmp_path).trainer.strategy
    assert type(strategy).__name__ == "DropComputeStrategy"
    assert (strategy.threshold, strategy.warmup_steps, strategy.normalize) == (read, 10, "maximum")
    assert strategy.delay == StallDelay(p=0.1, factor=3.0)
    assert any(base.__module__.startswith(root) for base in type(strategy).__mro__)


# ---------------------------------------------------------------------------------------------------- whole processes

SCRIPT = """
import json, os, sys
import torch
from {root} import LightningModule, Trainer

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(64, 4, generator=torch.Generator().manual_seed(1)), batch_size=2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_end(self):
        strategy = self.trainer.strategy
        found = dict(rank=self.global_rank, world=self.trainer.world_size, kind=type(strategy).__name__,
                     base=type(strategy).__bases__[1].__module__.partition(".")[0], steps=self.trainer.global_step,
                     weight=self.net.weight.detach().double().sum().item(),
                     sampler=type(self.trainer.train_dataloader.sampler).__name__)
        os.write(1, (json.dumps(found) + chr(10)).encode())

if __name__ == "__main__":
    Trainer(accelerator="cpu", devices=2, strategy=sys.argv[1], accumulate_grad_batches=4, max_epochs=2, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False).fit(Model())
"""


@pytest.mark.long
@pytest.mark.parametrize("root", NAMESPACES)
def test_an_untouched_project_launched_on_two_processes(root: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT.replace("{root}", root))
    done = run_python("-m", "lightning_eff", "run", "train.py", "dropcompute", cwd=tmp_path)
    found = sorted(reports(done), key=lambda line: line["rank"])
    assert [line["rank"] for line in found] == [0, 1]
    for line in found:
        assert (line["world"], line["kind"], line["steps"]) == (2, "DropComputeStrategy", 8)
        assert line["base"] == root.partition(".")[0]
        assert line["sampler"] == "DistributedSampler"
        assert line["weight"] == found[0]["weight"]
    assert "dropcompute: 8 steps in" in done.stdout
