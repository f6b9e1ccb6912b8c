"""strategy="pipelined_bp" inside Lightning: callbacks, metrics, precisions and what else goes on, as in one process.

In one process (the emulation) everything Lightning does is plain; so two ranks are compared with it, to the bit.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as known  # draws random numbers when it is imported: before any run
from torch.nn import functional as F

from tests.harness import RanksFailedError, run_ranks
from tests.strategies.pipelined_bp.models import (
    CUTS,
    EPOCH,
    STEPS,
    Outcome,
    bits,
    differences,
    loader,
    outcome_of,
    strategy,
    task,
    trainer,
    val_loader,
)


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


CONVERTING = ("dfp16", "fp8-rowwise")


def _scenario(rank: int, world: int, folder: str, name: str, given: dict[str, Any]) -> Outcome:
    scenario = {"steps": STEPS, "plan": {}, "model": {}, "options": {}, **SCENARIOS.get(name, {}), **given}
    options = scenario["options"]() if callable(scenario["options"]) else scenario["options"]
    extra = callbacks(name, folder)
    model = task(**{"dropout": 0.2, "norm": "batch", **scenario["model"]})
    model.on_train_end = lambda: converted.extend(run.precision_plugin.states() if name in CONVERTING else [])
    converted: list[str] = []
    run = trainer(strategy(stages=CUTS[2], **scenario["plan"]), devices=world, callbacks=extra, **options)
    run.fit(model, loader(), val_loader())
    outcome = outcome_of(model, run)
    outcome.extra = {
        "logged": {k: float(v) for k, v in run.callback_metrics.items()},
        "saved": sorted(Path(path).name for path in getattr(run.checkpoint_callback, "best_k_models", {})),
        "best": bits(getattr(run.checkpoint_callback, "best_model_score", None)),
        "converted": converted,
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
    assert bool(one.extra["converted"]) is (name in CONVERTING)
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
