"""strategy="dropcompute" inside Lightning: hooks, logs, and what else goes on in a step, as with stock DDP."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.errors import EffError
from tests.harness import run_ranks
from tests.strategies.dropcompute.plans import PLAN, SAMPLES, STEPS, M, planned
from tests.strategies.models import BATCH, FEATURES, loader, loss_of, ours, parameters_of, stock, task, trainer

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
