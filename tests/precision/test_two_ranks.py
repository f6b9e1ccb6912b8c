"""Two ranks under DDP: equal replicas, unequal rounding, one verdict on a broken gradient, each rank's own state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff.errors import NonFiniteGradientError
from tests.harness import run_ranks
from tests.precision.models import parameters_of, task
from tests.precision.ranks import fit_on_rank


def _replicas(rank: int, world_size: int, precision: str) -> tuple[list[Any], list[int], list[Any]]:
    steps, local = [], []

    def on_before_zero_grad(self: Any, optimizer: Any) -> None:
        steps.append(parameters_of(self))

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        if batch_idx == 0:
            self.net[2].weight.register_hook(lambda grad: local.append(grad.clone()))  # before the reduction
        return loss

    model = task(on_before_zero_grad=on_before_zero_grad, training_step=training_step)
    runner = fit_on_rank(rank, model, same=True, precision=precision)
    steps.append(parameters_of(model))
    return steps, [runner.precision_plugin.seeds.seed, runner.precision_plugin.seeds.calls], local


@pytest.mark.parametrize("precision", ["luq4", "luq4+bf16-mixed"])
def test_replicas_stay_equal_and_ranks_round_differently(precision: str) -> None:
    """Both ranks see the same data and seed: only the rounding tells their gradients apart."""
    (steps_0, seeds_0, local_0), (steps_1, seeds_1, local_1) = run_ranks(_replicas, 2, precision, init_group=False)
    assert len(steps_0) == len(steps_1) >= 5
    for first, second in zip(steps_0, steps_1, strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(steps_0[0], steps_0[-1])
    assert seeds_0 == seeds_1 == [3, 8]
    assert len(local_0) == 4
    assert not any(torch.equal(first, second) for first, second in zip(local_0, local_1, strict=True))


def _state_on_one_rank(rank: int, world_size: int) -> dict[str, Any]:
    from lightning_eff import LUQPrecision

    plugin = LUQPrecision()
    plugin.convert_module(task())
    return plugin.state_dict() if rank == 0 else {}


def test_asking_one_rank_for_the_state_does_not_wait_for_the_other() -> None:
    """The ranks' states are one: no collective, so no deadlock in a user's own saving."""
    state, _ = run_ranks(_state_on_one_rank, 2, timeout_s=20.0)
    assert state == {"seed": None, "calls": 0, "phase": "quantized", "memory": {}}


def _poisoned(rank: int, world_size: int, at: int) -> tuple[str, bool]:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if batch_idx == at:
            self.before = parameters_of(self)
        return self.loss(batch) * (torch.nan if batch_idx == at and rank == 1 else 1.0)

    model = task(training_step=training_step)
    try:
        fit_on_rank(rank, model, precision="luq4")
    except NonFiniteGradientError as error:
        return str(error), torch.equal(parameters_of(model), model.before) and type(model.net[2]) is nn.Linear
    return "", False


@pytest.mark.parametrize("at", [0, 3])
def test_a_nan_on_one_rank_stops_both(at: int) -> None:
    stories = run_ranks(_poisoned, 2, at, init_group=False)
    for rank, (message, unchanged) in enumerate(stories):
        assert f"optimizer step {at} (rank {rank})" in message
        assert unchanged


def _save_and_resume(rank: int, world_size: int, folder: str, hindsight: float | None) -> dict[str, Any]:
    from lightning.pytorch.callbacks import Callback

    from lightning_eff import LUQPrecision

    path = Path(folder) / "cut.ckpt"

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)  # on both ranks; rank 0 writes

    whole, continued = task(), task()
    fit_on_rank(rank, whole, plugins=[LUQPrecision(hindsight=hindsight)], max_epochs=2, callbacks=[Save()])
    plugins = [LUQPrecision(hindsight=hindsight)]
    fit_on_rank(rank, continued, plugins=plugins, max_epochs=2, seed=4, resume=str(path))
    saved = torch.load(path, weights_only=True)["LUQPrecision"]
    return {"equal": torch.equal(parameters_of(whole), parameters_of(continued)), "losses": whole.losses[4:],
            "again": continued.losses, "saved": saved}  # fmt: skip


@pytest.mark.parametrize("hindsight", [None, 0.5])
def test_each_rank_resumes_its_own_state(tmp_path: Path, hindsight: float | None) -> None:
    results = run_ranks(_save_and_resume, 2, str(tmp_path), hindsight, init_group=False)
    for result in results:
        assert result["equal"]
        assert result["losses"] == result["again"]
        assert len(result["again"]) == 4
    maxima = results[0]["saved"]["memory"]
    if hindsight is None:
        assert maxima == {}
    else:
        assert set(maxima) == {"net.2", "net.4"}
        assert all(roles["grad"]["value"] > 0 for roles in maxima.values())
