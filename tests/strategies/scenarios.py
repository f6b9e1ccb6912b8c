"""Every order in which a Trainer, a model and a strategy may be used again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.strategies.uses import Run, new_model, rows


def fit_longer(run: Run) -> Any:
    trainer, model = run.trainer(), new_model()
    trainer.fit(model, rows(), rows(2))
    return run.longer(trainer, model)


def fit_again_without_more_epochs(run: Run) -> Any:
    trainer, model = run.trainer(), new_model()
    trainer.fit(model, rows())
    trainer.fit(model, rows())
    return model


def fit_longer_from_a_checkpoint(run: Run) -> Any:
    trainer, model = run.trainer(), new_model()
    trainer.fit(model, rows())
    trainer.save_checkpoint(f"{run.folder}/a.ckpt")
    other, model = run.trainer(max_epochs=4), new_model()
    other.fit(model, rows(), ckpt_path=f"{run.folder}/a.ckpt")
    return model


def fit_longer_from_a_checkpoint_in_the_same_trainer(run: Run) -> Any:
    trainer, model = run.trainer(), new_model()
    trainer.fit(model, rows())
    trainer.save_checkpoint(f"{run.folder}/a.ckpt")
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, rows(), ckpt_path=f"{run.folder}/a.ckpt")
    return model


def validate_and_test_before_and_after(run: Run) -> Any:
    trainer, model = run.trainer(), new_model()
    trainer.validate(model, rows(2), verbose=False)
    trainer.fit(model, rows(), rows(2))
    trainer.validate(model, rows(2), verbose=False)
    trainer.test(model, rows(2), verbose=False)
    return run.longer(trainer, model)


def another_model_in_the_same_trainer(run: Run) -> Any:
    trainer, other = run.trainer(), new_model()
    trainer.fit(new_model(), rows())
    with torch.no_grad():
        other.head.weight.add_(0.1)
    return run.longer(trainer, other)


def another_trainer(run: Run) -> Any:
    first = run.trainer()
    first.fit(new_model(), rows())
    first.validate(new_model(), rows(2), verbose=False)
    return run.longer(run.trainer(), new_model(), 2)


def find_a_learning_rate_first(run: Run) -> Any:
    from lightning.pytorch.tuner import Tuner

    trainer, model = run.trainer(default_root_dir=run.folder), new_model()
    Tuner(trainer).lr_find(model, rows(), num_training=8, update_attr=False)
    return run.longer(trainer, model, 2)


def find_a_learning_rate_within(run: Run) -> Any:
    from lightning.pytorch.callbacks import LearningRateFinder

    search = LearningRateFinder(num_training_steps=8, update_attr=False)
    trainer, model = run.trainer(default_root_dir=run.folder, callbacks=[search]), new_model()
    return run.longer(trainer, model, 2)


def find_a_batch_size_first(run: Run) -> Any:
    from lightning.pytorch.tuner import Tuner

    def train_dataloader(self: Any) -> Any:
        return torch.utils.data.DataLoader(rows().dataset, batch_size=self.batch_size)

    model = new_model(train_dataloader=train_dataloader)
    model.batch_size = 2
    trainer = run.trainer(default_root_dir=run.folder)
    Tuner(trainer).scale_batch_size(model, max_trials=1, steps_per_trial=1, init_val=4)
    trainer.fit(model)
    return model


def two_optimizers(run: Run) -> Any:
    def configure_optimizers(self: Any) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.net, self.head)]

    model = new_model(configure_optimizers=configure_optimizers)
    run.trainer().fit(model, rows())
    return model


def a_group_added(run: Run) -> Any:
    def configure_optimizers(self: Any) -> Any:
        self.backbone.requires_grad_(False)
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)

    def on_train_epoch_start(self: Any) -> None:
        if self.current_epoch == 1:
            self.backbone.requires_grad_(True)
            self.optimizers().add_param_group({"params": list(self.backbone.parameters())})

    model = new_model(configure_optimizers=configure_optimizers, on_train_epoch_start=on_train_epoch_start)
    run.trainer(max_epochs=3).fit(model, rows())
    return model


def backbone_finetuning(run: Run) -> Any:
    from lightning.pytorch.callbacks import BackboneFinetuning

    model = new_model()
    run.trainer(max_epochs=3, callbacks=[BackboneFinetuning(1, verbose=False)]).fit(model, rows())
    return model


def frozen_by_turns(run: Run) -> Any:
    def on_train_epoch_start(self: Any) -> None:
        self.net.requires_grad_(self.current_epoch != 1)

    model = new_model(on_train_epoch_start=on_train_epoch_start)
    run.trainer(max_epochs=3).fit(model, rows())
    return model


def frozen_between_fits(run: Run) -> Any:
    trainer, model = run.trainer(), new_model()
    trainer.fit(model, rows())
    model.net[0].requires_grad_(False)
    return run.longer(trainer, model)


def a_layer_replaced_between_fits(run: Run) -> Any:
    trainer, model = run.trainer(), new_model()
    trainer.fit(model, rows())
    torch.manual_seed(3)
    model.net[2], model.head = nn.Linear(8, 8), nn.Linear(8, 1)
    return run.longer(trainer, model)


def a_layer_replaced_within(run: Run) -> Any:
    def on_train_epoch_start(self: Any) -> None:
        if self.current_epoch == 1:
            torch.manual_seed(3)
            self.head = nn.Linear(8, 1)
            self.optimizers().param_groups[0]["params"].extend(self.head.parameters())

    model = new_model(on_train_epoch_start=on_train_epoch_start)
    run.trainer().fit(model, rows())
    return model


def an_optimizer_kept_by_the_user(run: Run) -> Any:
    model = new_model()
    kept = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    type(model).configure_optimizers = lambda self: kept
    trainer = run.trainer()
    trainer.fit(model, rows())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, rows())
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

    model = new_model(on_train_epoch_start=on_train_epoch_start, configure_optimizers=configure_optimizers)
    run.trainer().fit(model, rows())
    return model


def the_raw_optimizer_read_and_set(run: Run) -> Any:
    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        for group in self.optimizers(use_pl_optimizer=False).param_groups:
            group["lr"] = 0.05 / (1 + batch_idx)

    model = new_model(on_train_batch_start=on_train_batch_start)
    run.trainer().fit(model, rows())
    return model


def the_raw_optimizer_stepped(run: Run) -> Any:
    def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        self.optimizers(use_pl_optimizer=False).step(closure)

    model = new_model(optimizer_step=optimizer_step)
    run.trainer().fit(model, rows())
    return model


def an_error_in_the_first_fit(run: Run) -> Any:
    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5 and not self.failed:
            self.failed = True
            raise self.error

    for error in (ValueError("of the user's code"), KeyboardInterrupt()):
        model = new_model(on_train_batch_start=on_train_batch_start)
        model.failed, model.error = False, error
        trainer = run.trainer()
        with pytest.raises((ValueError, SystemExit)):
            trainer.fit(model, rows(), rows(2))
    model.error = None
    trainer = run.trainer()
    run.before_last = copy.deepcopy(model)
    trainer.fit(model, rows(), rows(2))
    return model


def _once(**options: Any) -> Callable[[Run], Any]:
    def scenario(run: Run) -> Any:
        model = new_model()
        run.trainer(**options).fit(model, rows(), rows(2))
        return model

    return scenario


def a_schedule_of_accumulation(run: Run) -> Any:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    model = new_model()
    callback = GradientAccumulationScheduler({0: 1, 1: 3})
    run.trainer(accumulate_grad_batches=1, callbacks=[callback]).fit(model, rows())
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
