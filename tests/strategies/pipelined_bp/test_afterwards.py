"""After a run the model is whole, and nothing that was exchanged is left behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.harness import run_ranks
from tests.strategies.pipelined_bp.models import (
    CUTS,
    STEPS,
    bits,
    loader,
    strategy,
    task,
    trainer,
    val_loader,
)


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
