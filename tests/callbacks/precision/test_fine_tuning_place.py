"""The place of the fine-tuning phase follows the run's end, and its learning rates leave the schedule alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_eff.callbacks import LUQFineTuning
from lightning_eff.errors import ConfigurationError, EffWarning
from tests.lifetimes.subjects import At, Manual, Net, fit, outcome, same, trainer


class Watch(Callback):
    """Learning rates of every group at each step, and whether it was in the phase."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.phase: list[bool] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])
        self.phase.append(trainer.precision_plugin.weights_only)

    @property
    def first(self) -> list[float]:
        return [rates[0] for rates in self.rates]


class Scheduled(Net):
    """One parameter group, or two, under a schedule that multiplies the rate after every step."""

    def __init__(self, gamma: float = 0.5, groups: int = 1) -> None:
        super().__init__()
        self.gamma, self.groups = gamma, groups

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        groups = [{"params": parameters[i :: self.groups], "lr": 0.1 * 10**-i} for i in range(self.groups)]
        optimizer = torch.optim.SGD(groups)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.gamma)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def runner(*callbacks: Callback, steps: int = 3, **options: Any) -> Trainer:
    """Four steps an epoch."""
    return trainer(precision="luq4", callbacks=[LUQFineTuning(steps), *callbacks], **options)


def test_the_schedule_goes_on_beneath_the_phase() -> None:
    """The rates of the phase are in the optimizer during its steps only; a scheduler never multiplies them."""
    found: list[float] = []
    watch = Watch()
    look = At(lambda trainer, _: found.append(trainer.optimizers[0].param_groups[0]["lr"]), batch=4)
    fit(runner(watch, look), Scheduled())
    assert watch.first == pytest.approx([0.1, 0.05, 0.05 + 0.05 * 2 / 3, 0.1 * 1 / 1.5])
    assert watch.phase == [False, True, True, True]
    assert found == pytest.approx([0.1 * 0.5**4])


def test_accumulated_micro_batches_have_one_rate() -> None:
    watch = Watch()
    fit(runner(watch, steps=1, accumulate_grad_batches=2), Scheduled())
    assert watch.first == pytest.approx([0.1, 0.05])
    assert watch.phase == [False, True]


def resumed(folder: Path, *, cut: int, epochs: int, **options: Any) -> tuple[Watch, Any]:
    path, watch, model = folder / "cut.ckpt", Watch(), Scheduled(**options)
    save = At(lambda trainer, _: trainer.save_checkpoint(path), batch=cut)
    fit(runner(save, max_epochs=2), Scheduled(**options))
    fit(runner(watch, max_epochs=epochs), model, ckpt_path=path, weights_only=True)
    return watch, model


def whole(epochs: int, **options: Any) -> tuple[Watch, Any]:
    watch, model = Watch(), Scheduled(**options)
    fit(runner(watch, max_epochs=epochs), model)
    return watch, model


def test_a_run_made_longer_before_the_phase_is_the_longer_run(tmp_path: Path) -> None:
    """Cut at the end of an epoch, before the phase; without a word."""
    watch, model = resumed(tmp_path, cut=4, epochs=3, groups=2)
    expected, reference = whole(3, groups=2)
    assert watch.rates == expected.rates[4:]
    assert watch.phase == [False] * 5 + [True] * 3
    assert same(outcome(model), outcome(reference))


def test_a_run_made_longer_after_the_phase_says_so_and_never_stands_still(tmp_path: Path) -> None:
    with pytest.warns(EffWarning, match=r"began at step 5, moves to step 13.*4 bits again.*learning rates \(now"):
        watch, _ = resumed(tmp_path, cut=8, epochs=4)
    assert watch.phase == [False] * 5 + [True] * 3
    expected, _ = whole(4)
    assert watch.first[:6] == pytest.approx(expected.first[8:14])  # the schedule's own, as if there had been no phase
    assert all(watch.first)


@pytest.mark.parametrize("shorter", [False, True])
def test_a_second_fit_moves_the_phase(shorter: bool) -> None:
    """Also where its epochs have another length, which the first fit's count does not know of."""
    watch, model = Watch(), Scheduled()
    run = runner(watch)
    fit(run, model)
    watch.phase.clear()
    watch.rates.clear()
    run.fit_loop.max_epochs = 4
    model.batch_size = 16 if shorter else 8
    steps = 3 * len(model.train_dataloader())
    with pytest.warns(EffWarning, match=rf"moves to step {4 + steps - 3}"):
        fit(run, model)
    assert watch.phase == [False] * (steps - 3) + [True] * 3
    assert all(watch.first)


def test_a_run_that_goes_on_within_the_phase_keeps_its_triangle() -> None:
    """Interrupted in the phase, and fitted again."""

    class Once(Net):
        broken = False

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0 and self.current_epoch == 1 and not self.broken:
                self.broken = True
                raise RuntimeError

    watch, expected, model = Watch(), Watch(), Once()
    run = runner(watch, steps=6, max_epochs=2)
    with pytest.raises(RuntimeError):
        fit(run, model)
    rates = [group["lr"] for group in run.optimizers[0].param_groups]
    assert rates == [0.05], "the schedule's, although it was broken off in the phase"
    with warnings.catch_warnings():
        warnings.simplefilter("error", EffWarning)
        fit(run, model)
    fit(runner(expected, steps=6, max_epochs=2), Net())
    assert watch.rates == expected.rates
    assert watch.phase == expected.phase


def test_epochs_added_while_it_runs_move_the_phase() -> None:
    class Longer(Net):
        def on_train_epoch_end(self) -> None:
            self.trainer.fit_loop.max_epochs = 3

    watch = Watch()
    fit(runner(watch, max_epochs=2), Longer())
    assert watch.phase == [False] * 9 + [True] * 3


def test_a_new_run_is_in_four_bits_again() -> None:
    """Another model: neither the phase nor its rates are left."""
    callback, results = LUQFineTuning(3), []
    for _ in range(2):
        watch = Watch()
        fit(trainer(precision="luq4", callbacks=[callback, watch]), Scheduled())
        results.append((watch.rates, watch.phase))
    assert results[0] == results[1]
    run = trainer(precision="luq4", callbacks=[callback])
    fit(run, Net())
    run.fit_loop.max_epochs = 2
    run.callbacks.append(watch := Watch())
    fit(run, Net(seed=1))
    assert watch.phase == [False, True, True, True]


@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("raw", [False, True])
def test_in_manual_optimization_the_phase_is_its_last_batches(raw: bool, optimizers: int) -> None:
    """Lightning counts two steps a batch, or none; the run ends with its batches."""
    seen: list[tuple[bool, list[float]]] = []

    class Look(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            found = [optimizer.param_groups[0]["lr"] for optimizer in self.trainer.optimizers]
            seen.append((self.trainer.precision_plugin.weights_only, found))

    stepped: list[float] = []
    model = Look(raw, optimizers)
    hook = lambda optimizer, *_: stepped.append(optimizer.param_groups[0]["lr"])  # noqa: E731

    class Hook(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(hook)

    fit(runner(Hook(), max_epochs=2), model)
    assert [phase for phase, _ in seen] == [False] * 5 + [True] * 3
    assert all(rates == [0.05] * optimizers for _, rates in seen), "after its step each has the schedule's rate again"
    assert len(stepped) == 8 * optimizers
    assert all(stepped)
    assert stepped[-1] == pytest.approx(0.05 * 1 / 1.5)


def test_where_a_manual_run_ends_must_be_known() -> None:
    with pytest.raises(ConfigurationError, match="give the Trainer one of them"):
        fit(runner(max_epochs=2, max_steps=5), Manual(raw=False))
    watch = Watch()
    fit(runner(watch, max_epochs=-1, max_steps=5), Manual(raw=False))
    assert watch.phase == [False] * 2 + [True] * 3
    fit(runner(fast_dev_run=3), Manual(raw=False))


def test_groups_are_known_by_their_parameters() -> None:
    """One that is added has a base of its own; one that comes back from a file has the one it had."""

    class Grows(Net):
        def __init__(self) -> None:
            super().__init__()
            self.late = torch.nn.Parameter(torch.zeros(3))

        def loss(self, batch: Any) -> Any:
            return super().loss(batch) + (self.late * batch[0].mean()).sum()

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.optimizers().add_param_group({"params": [self.late], "lr": 0.003})

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.05)

    callback, watch = LUQFineTuning(3), Watch()
    fit(trainer(precision="luq4", callbacks=[callback, watch], max_epochs=2), Grows())
    assert [len(rates) for rates in watch.rates] == [1] * 4 + [2] * 4
    assert watch.rates[-1] == pytest.approx([0.05 / 1.5, 0.003 / 1.5])
    assert callback.state_dict()["base_lrs"] == [0.05, 0.003]
    assert callback.state_dict()["start_lrs"] == [0.05, 0.003]


def test_a_group_that_is_added_to_the_first_of_two_optimizers() -> None:
    """In one list it would shift the groups of the second."""

    class Grows(Manual):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                late = torch.nn.Parameter(torch.zeros(3))
                self.trainer.optimizers[0].add_param_group({"params": [late], "lr": 0.003})
                self.trainer.optimizers[1].param_groups[0]["lr"] = 0.04

    callback = LUQFineTuning(3)
    fit(trainer(precision="luq4", callbacks=[callback], max_epochs=2), Grows(raw=False, optimizers=2))
    assert callback.state_dict()["base_lrs"] == [0.05, 0.003, 0.05]
    assert callback.state_dict()["start_lrs"] == [0.05, 0.003, 0.04]
