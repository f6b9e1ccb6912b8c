"""Nothing of a strategy outlives what it belongs to: a Trainer, a model and a strategy are used again in every order.

At its neutral setting (a threshold of infinity, one stage) each way of using them ends with the bits of plain
Lightning, or is refused by a typed error before a step. With a real setting the last fit ends with the bits of the same
fit under a strategy that was never used.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.errors import EffError
from tests.harness import run_ranks
from tests.strategies.models import parameters_of

LONG = pytest.mark.long
M = 2
"""Micro-batches of a step under dropcompute."""


def _strategy(name: str) -> Any:
    """Of that name: ``plain`` is what a Trainer takes by itself."""
    from lightning_eff.strategies import DropComputeStrategy, PipelinedBPStrategy

    common = {"process_group_backend": "gloo", "timeout_s": 30.0}
    return {
        "plain": lambda: "auto",  # with what is accumulated under the strategy it is compared with
        "dropcompute": lambda: DropComputeStrategy(threshold=math.inf, **common),
        "one stage": lambda: PipelinedBPStrategy(stages=1, module="net", **common),
        "three stages": lambda: PipelinedBPStrategy(
            stages=["net.1", "net.3"], module="net", schedule_picture=False, **common
        ),
        "two stages": lambda: PipelinedBPStrategy(stages=["net.2"], module="net", schedule_picture=False, **common),
    }[name.partition(" for ")[0]]()


def _model(**hooks: Callable[..., Any]) -> Any:
    """Of layers with and without a body to be unfrozen; momentum, so that an optimizer has a state."""
    from lightning.pytorch import LightningModule

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone = nn.Linear(6, 8)
            self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
            self.head, self.lr = nn.Linear(8, 1), 0.05

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.net(self.backbone(x)))
            return out

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = (self(batch[0]) - batch[0].sum(1, keepdim=True).sin()).square().mean()
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self(batch[0]).square().mean(), sync_dist=True)

        test_step = validation_step

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.SGD(trained, lr=self.lr, momentum=0.9)

    return type("Model", (Model,), hooks)()


def _rows(seed: int = 1) -> Any:
    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)


def _trainer(strategy: Any, **options: Any) -> Any:
    from lightning.pytorch import Trainer

    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    small = dict(accelerator="cpu", devices=1, max_epochs=2, num_sanity_val_steps=0, use_distributed_sampler=False)
    if options.get("barebones"):
        quiet, small = {}, {k: v for k, v in small.items() if k != "num_sanity_val_steps"}
    return Trainer(strategy=strategy, **{**quiet, **small, **options})


class Run:
    """One use of a strategy in a scenario.

    Attributes:
        strategy: used in every Trainer of the scenario.
        folder: for checkpoints.
        accumulate: micro-batches of a step.
        before_last: a copy of the model before the last fit, where a scenario says it may be repeated from there.
    """

    def __init__(self, strategy: Any, folder: str, accumulate: int, world: int = 1) -> None:
        self.strategy, self.folder, self.accumulate, self.world = strategy, folder, accumulate, world
        self.before_last: Any = None

    def trainer(self, **options: Any) -> Any:
        options = {"accumulate_grad_batches": self.accumulate, **options}
        if not isinstance(self.strategy, str):  # Lightning refuses a strategy that has them, whatever strategy it is
            self.strategy.accelerator = self.strategy.parallel_devices = None
        return _trainer(self.strategy, devices=self.world, **options)

    def longer(self, trainer: Any, model: Any, epochs: int = 4) -> Any:
        self.before_last = copy.deepcopy(model)
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(model, _rows(), _rows(2))
        return model


# ---------------------------------------------------------------------------------------------------- scenarios


def fit_longer(run: Run) -> Any:
    trainer, model = run.trainer(), _model()
    trainer.fit(model, _rows(), _rows(2))
    return run.longer(trainer, model)


def fit_again_without_more_epochs(run: Run) -> Any:
    trainer, model = run.trainer(), _model()
    trainer.fit(model, _rows())
    trainer.fit(model, _rows())
    return model


def fit_longer_from_a_checkpoint(run: Run) -> Any:
    trainer, model = run.trainer(), _model()
    trainer.fit(model, _rows())
    trainer.save_checkpoint(f"{run.folder}/a.ckpt")
    other, model = run.trainer(max_epochs=4), _model()
    other.fit(model, _rows(), ckpt_path=f"{run.folder}/a.ckpt")
    return model


def fit_longer_from_a_checkpoint_in_the_same_trainer(run: Run) -> Any:
    trainer, model = run.trainer(), _model()
    trainer.fit(model, _rows())
    trainer.save_checkpoint(f"{run.folder}/a.ckpt")
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, _rows(), ckpt_path=f"{run.folder}/a.ckpt")
    return model


def validate_and_test_before_and_after(run: Run) -> Any:
    trainer, model = run.trainer(), _model()
    trainer.validate(model, _rows(2), verbose=False)
    trainer.fit(model, _rows(), _rows(2))
    trainer.validate(model, _rows(2), verbose=False)
    trainer.test(model, _rows(2), verbose=False)
    return run.longer(trainer, model)


def another_model_in_the_same_trainer(run: Run) -> Any:
    trainer, other = run.trainer(), _model()
    trainer.fit(_model(), _rows())
    with torch.no_grad():
        other.head.weight.add_(0.1)
    return run.longer(trainer, other)


def another_trainer(run: Run) -> Any:
    first = run.trainer()
    first.fit(_model(), _rows())
    first.validate(_model(), _rows(2), verbose=False)
    return run.longer(run.trainer(), _model(), 2)


def find_a_learning_rate_first(run: Run) -> Any:
    from lightning.pytorch.tuner import Tuner

    trainer, model = run.trainer(default_root_dir=run.folder), _model()
    Tuner(trainer).lr_find(model, _rows(), num_training=8, update_attr=False)
    return run.longer(trainer, model, 2)


def find_a_learning_rate_within(run: Run) -> Any:
    from lightning.pytorch.callbacks import LearningRateFinder

    search = LearningRateFinder(num_training_steps=8, update_attr=False)
    trainer, model = run.trainer(default_root_dir=run.folder, callbacks=[search]), _model()
    return run.longer(trainer, model, 2)


def find_a_batch_size_first(run: Run) -> Any:
    from lightning.pytorch.tuner import Tuner

    def train_dataloader(self: Any) -> Any:
        return torch.utils.data.DataLoader(_rows().dataset, batch_size=self.batch_size)

    model = _model(train_dataloader=train_dataloader)
    model.batch_size = 2
    trainer = run.trainer(default_root_dir=run.folder)
    Tuner(trainer).scale_batch_size(model, max_trials=1, steps_per_trial=1, init_val=4)
    trainer.fit(model)
    return model


def two_optimizers(run: Run) -> Any:
    def configure_optimizers(self: Any) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.net, self.head)]

    model = _model(configure_optimizers=configure_optimizers)
    run.trainer().fit(model, _rows())
    return model


def a_group_added(run: Run) -> Any:
    def configure_optimizers(self: Any) -> Any:
        self.backbone.requires_grad_(False)
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)

    def on_train_epoch_start(self: Any) -> None:
        if self.current_epoch == 1:
            self.backbone.requires_grad_(True)
            self.optimizers().add_param_group({"params": list(self.backbone.parameters())})

    model = _model(configure_optimizers=configure_optimizers, on_train_epoch_start=on_train_epoch_start)
    run.trainer(max_epochs=3).fit(model, _rows())
    return model


def backbone_finetuning(run: Run) -> Any:
    from lightning.pytorch.callbacks import BackboneFinetuning

    model = _model()
    run.trainer(max_epochs=3, callbacks=[BackboneFinetuning(1, verbose=False)]).fit(model, _rows())
    return model


def frozen_by_turns(run: Run) -> Any:
    def on_train_epoch_start(self: Any) -> None:
        self.net.requires_grad_(self.current_epoch != 1)

    model = _model(on_train_epoch_start=on_train_epoch_start)
    run.trainer(max_epochs=3).fit(model, _rows())
    return model


def frozen_between_fits(run: Run) -> Any:
    trainer, model = run.trainer(), _model()
    trainer.fit(model, _rows())
    model.net[0].requires_grad_(False)
    return run.longer(trainer, model)


def a_layer_replaced_between_fits(run: Run) -> Any:
    trainer, model = run.trainer(), _model()
    trainer.fit(model, _rows())
    torch.manual_seed(3)
    model.net[2], model.head = nn.Linear(8, 8), nn.Linear(8, 1)
    return run.longer(trainer, model)


def a_layer_replaced_within(run: Run) -> Any:
    def on_train_epoch_start(self: Any) -> None:
        if self.current_epoch == 1:
            torch.manual_seed(3)
            self.head = nn.Linear(8, 1)
            self.optimizers().param_groups[0]["params"].extend(self.head.parameters())

    model = _model(on_train_epoch_start=on_train_epoch_start)
    run.trainer().fit(model, _rows())
    return model


def an_optimizer_kept_by_the_user(run: Run) -> Any:
    model = _model()
    kept = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    type(model).configure_optimizers = lambda self: kept
    trainer = run.trainer()
    trainer.fit(model, _rows())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, _rows())
    return model


def a_scheduler_exchanged(run: Run) -> Any:
    def on_train_epoch_start(self: Any) -> None:
        raw = self.optimizers(use_pl_optimizer=False)
        schedule = torch.optim.lr_scheduler.ExponentialLR(raw, 0.9)
        self.trainer.strategy.lr_scheduler_configs[0].scheduler = schedule

    def configure_optimizers(self: Any) -> Any:
        made = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(made, 1)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    model = _model(on_train_epoch_start=on_train_epoch_start, configure_optimizers=configure_optimizers)
    run.trainer().fit(model, _rows())
    return model


def the_raw_optimizer_read_and_set(run: Run) -> Any:
    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        for group in self.optimizers(use_pl_optimizer=False).param_groups:
            group["lr"] = 0.05 / (1 + batch_idx)

    model = _model(on_train_batch_start=on_train_batch_start)
    run.trainer().fit(model, _rows())
    return model


def the_raw_optimizer_stepped(run: Run) -> Any:
    def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        self.optimizers(use_pl_optimizer=False).step(closure)

    model = _model(optimizer_step=optimizer_step)
    run.trainer().fit(model, _rows())
    return model


def an_error_in_the_first_fit(run: Run) -> Any:
    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5 and not self.failed:
            self.failed = True
            raise self.error

    for error in (ValueError("of the user's code"), KeyboardInterrupt()):
        model = _model(on_train_batch_start=on_train_batch_start)
        model.failed, model.error = False, error
        trainer = run.trainer()
        with pytest.raises((ValueError, SystemExit)):
            trainer.fit(model, _rows(), _rows(2))
    model.error = None
    trainer = run.trainer()
    run.before_last = copy.deepcopy(model)
    trainer.fit(model, _rows(), _rows(2))
    return model


def _once(**options: Any) -> Callable[[Run], Any]:
    def scenario(run: Run) -> Any:
        model = _model()
        run.trainer(**options).fit(model, _rows(), _rows(2))
        return model

    return scenario


def a_schedule_of_accumulation(run: Run) -> Any:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    model = _model()
    callback = GradientAccumulationScheduler({0: 1, 1: 3})
    run.trainer(accumulate_grad_batches=1, callbacks=[callback]).fit(model, _rows())
    return model


OPTIONS: dict[str, Callable[[Run], Any]] = {
    "log_every_n_steps=0": _once(log_every_n_steps=0),
    "barebones": _once(barebones=True),
    "limit_train_batches=0": _once(limit_train_batches=0),
    "val_check_interval": _once(val_check_interval=5),
    "max_time": _once(max_time={"seconds": 60}),
    "fast_dev_run": _once(fast_dev_run=3),
    "overfit_batches": _once(overfit_batches=5),
    "clip by norm": _once(gradient_clip_val=0.05),
    "clip by value": _once(gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    "max_steps": _once(max_steps=3),
}
SCENARIOS: dict[str, Callable[[Run], Any]] = {
    scenario.__name__.replace("_", " "): scenario
    for scenario in (
        fit_longer,
        fit_again_without_more_epochs,
        fit_longer_from_a_checkpoint,
        fit_longer_from_a_checkpoint_in_the_same_trainer,
        validate_and_test_before_and_after,
        another_model_in_the_same_trainer,
        another_trainer,
        find_a_learning_rate_first,
        find_a_learning_rate_within,
        find_a_batch_size_first,
        two_optimizers,
        a_group_added,
        backbone_finetuning,
        frozen_by_turns,
        frozen_between_fits,
        a_layer_replaced_between_fits,
        a_layer_replaced_within,
        an_optimizer_kept_by_the_user,
        a_scheduler_exchanged,
        the_raw_optimizer_read_and_set,
        the_raw_optimizer_stepped,
        an_error_in_the_first_fit,
        a_schedule_of_accumulation,
    )
} | OPTIONS
REFUSED = {
    "dropcompute": {"two optimizers", "find a batch size first", "the raw optimizer stepped"},
    "one stage": {"two optimizers", "find a batch size first", "a schedule of accumulation"},
    "three stages": {
        "two optimizers", "find a batch size first", "the raw optimizer stepped", "a group added", "frozen by turns",
        "backbone finetuning", "a layer replaced within", "a schedule of accumulation",
    },
}  # fmt: skip
"""What each refuses; plain Lightning refuses two optimizers as well."""


# ---------------------------------------------------------------------------------------------------- comparisons


def _end(name: str, scenario: str, folder: str, accumulate: int, world: int = 1) -> tuple[Tensor | str, Tensor | None]:
    """Parameters when the scenario has ended, or the error; and those of its last fit under a fresh strategy."""
    run = Run(_strategy(name), folder, accumulate, world)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = SCENARIOS[scenario](run)
        except EffError as error:
            return type(error).__name__, None
        except ValueError as error:  # Lightning's own refusal
            if "not supported with distributed strategies" not in str(error):
                raise
            return "by Lightning", None
        if not name.startswith("plain") and run.before_last is not None:
            Run(_strategy(name), folder, accumulate, world).trainer().fit(run.before_last, _rows(), _rows(2))
            return parameters_of(model), parameters_of(run.before_last)
    return parameters_of(model), None


def _ends(rank: int, world: int, name: str, folder: str, scenarios: list[str]) -> dict[str, Any]:
    """How each scenario ends, one after the other in the same processes, as in a notebook."""
    accumulate = M if name.removeprefix("plain for ") == "dropcompute" else 1
    told = {}
    for scenario in scenarios:
        place = Path(folder) / scenario
        place.mkdir(parents=True, exist_ok=True)
        try:
            told[scenario] = _end(name, scenario, str(place), accumulate, world)
        except Exception as error:  # noqa: BLE001 - told with its scenario
            told[scenario] = f"not typed: {error!r}"
    return told


def _run(name: str, folder: Path, scenarios: list[str], world: int = 1) -> dict[str, Any]:
    """Of rank 0, none of them ended by an error that is not typed."""
    told = run_ranks(_ends, world, name, str(folder), scenarios, init_group=False, timeout_s=110.0)[0]
    assert not {scenario: end for scenario, end in told.items() if isinstance(end, str)}
    refused = {scenario for scenario, (end, _) in told.items() if isinstance(end, str)}
    assert refused == REFUSED.get(name, set()) & set(scenarios)
    return {scenario: ends for scenario, ends in told.items() if scenario not in refused}


@pytest.mark.parametrize("name", ["dropcompute", "one stage"])
def test_at_its_neutral_setting_every_use_ends_as_plain_lightning_does(name: str, tmp_path: Path) -> None:
    mine = _run(name, tmp_path, list(SCENARIOS))
    assert len(mine) > 28
    plain = _run(f"plain for {name}", tmp_path, list(mine))
    for scenario, (weights, _) in mine.items():
        assert torch.equal(weights, plain[scenario][0]), scenario


def test_a_used_strategy_trains_as_a_fresh_one(tmp_path: Path) -> None:
    ends = _run("three stages", tmp_path, list(SCENARIOS))
    fresh = {scenario: pair for scenario, pair in ends.items() if pair[1] is not None}
    assert len(fresh) == 9
    assert all(weights.isfinite().all() for weights, _ in ends.values())
    for scenario, (weights, other) in fresh.items():
        assert torch.equal(weights, other), scenario


TOGETHER = ["fit longer", "find a learning rate within", "an optimizer kept by the user"]
ALSO = [
    "another model in the same trainer", "find a learning rate first", "a layer replaced between fits",
    "frozen between fits", "fit longer from a checkpoint in the same trainer", "validate and test before and after",
    "barebones", "log_every_n_steps=0", "limit_train_batches=0",
]  # fmt: skip


@pytest.mark.parametrize("scenarios", [TOGETHER[:2], pytest.param([*TOGETHER, *ALSO], marks=LONG)], ids=["some", "all"])
def test_a_used_pipeline_of_two_processes_ends_as_in_one(tmp_path: Path, scenarios: list[str]) -> None:
    """What one process ends with is compared with fresh strategies and plain Lightning above."""
    real = _run("two stages", tmp_path / "two", scenarios, world=2)
    emulated = _run("two stages", tmp_path / "one", scenarios)
    for scenario, (weights, _) in real.items():
        assert torch.equal(weights, emulated[scenario][0]), scenario


@pytest.mark.long
def test_two_ranks_that_go_on_stay_equal(tmp_path: Path) -> None:
    for told in run_ranks(
        _ends, 2, "dropcompute", str(tmp_path), [*TOGETHER, *ALSO], init_group=False, timeout_s=110.0
    ):
        for scenario, ends in told.items():
            assert isinstance(ends, tuple), ends
            assert isinstance(ends[0], Tensor), scenario
            if ends[1] is not None:
                assert torch.equal(*ends), scenario


# ---------------------------------------------------------------------------------------------------- what was measured


def _measurements(rank: int, world: int) -> dict[str, tuple[float, bool]]:
    """The threshold in the first micro-batch of each fit, and after the first, and whether it was measured."""
    from lightning_eff.strategies import DropComputeStrategy

    used = DropComputeStrategy(warmup_steps=6, process_group_backend="gloo")
    seen: dict[str, tuple[float, bool]] = {}

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        seen.setdefault(self.fit, (used.threshold_s, used._search.has_measured))

    trainer, model = _trainer(used, accumulate_grad_batches=M), _model(on_train_batch_start=on_train_batch_start)
    model.fit = "first"
    trainer.fit(model, _rows())
    seen["measured"] = (used.threshold_s, used._search.has_measured)
    trainer.fit_loop.max_epochs, model.fit = 4, "longer"
    trainer.fit(model, _rows())
    other = _model(on_train_batch_start=on_train_batch_start)
    trainer.fit_loop.max_epochs, other.fit = 6, "other model"
    trainer.fit(other, _rows())
    assert trainer.global_step == 36
    assert used._steps == 12, "of the other model"
    return seen


def test_a_measured_threshold_belongs_to_its_run() -> None:
    """The layers, the batches and the machine's load may be others in the next; a checkpoint brings it back."""
    (seen,) = run_ranks(_measurements, 1, init_group=False)
    assert seen["first"] == seen["longer"] == seen["other model"] == (math.inf, False)
    assert seen["measured"][1]
