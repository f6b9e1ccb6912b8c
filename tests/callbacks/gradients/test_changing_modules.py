"""Callbacks that watch layers: those there are now, in no copy, and not after the batch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_eff.callbacks import GradientPruning, GradientStatistics
from tests.lifetimes.subjects import At, Manual, Net, Stop, fit, outcome, same, trainer

MAKES: dict[str, Callable[[], Any]] = {
    "pruning": lambda: GradientPruning(0.6, warmup_steps=0, refit_every_n_steps=100),
    "statistics": lambda: GradientStatistics(every_n_steps=1),
}
every_callback = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in module.modules())


def seen(callback: Any) -> dict[str, Any]:
    """Layer name -> what is known of it."""
    state = callback.state_dict()
    return state["ranks"][0] if "ranks" in state else state["layers"]


class During(Callback):
    """Calls ``action(model)`` between backward and the step of a batch."""

    def __init__(self, action: Callable[[Any], Any], batch: int = 1) -> None:
        self.action, self.batch = action, batch

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.batch:
            self.action(pl_module)


@every_callback
def test_hooks_are_there_during_a_batch_only(make: Callable[[], Any]) -> None:
    found: list[tuple[int, int]] = []
    during = During(lambda model: found.append((1, hooks(model))), batch=2)
    after = At(lambda _, model: found.append((0, hooks(model))))
    fit(trainer(callbacks=[make(), during, after]), Net())
    assert sorted(found) == [(0, 0), (1, 3)]


@every_callback
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_is_not_watched(make: Callable[[], Any], duplicate: Callable[[Any], Any]) -> None:
    """An EMA copy, made between backward and step, holds nothing of the callback and computes as a plain model."""
    copies: list[nn.Module] = []
    callback = make()
    fit(trainer(callbacks=[callback, During(lambda model: copies.append(duplicate(model.net)))]), Net())
    before, x = copy.deepcopy(callback.state_dict()), torch.randn(5, 6)
    plain = Net().net
    plain.load_state_dict(copies[0].state_dict())
    for model in (copies[0], plain):
        model(x).square().sum().backward()
    for ours, theirs in zip(copies[0].parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert repr(callback.state_dict()) == repr(before)


@every_callback
def test_a_copy_of_the_callback_watches_nothing(make: Callable[[], Any]) -> None:
    copies: list[Any] = []
    callback = make()
    fit(trainer(callbacks=[callback, During(lambda _: copies.append(copy.deepcopy(callback)))]), Net())
    model, again = Net(), Net()
    fit(trainer(callbacks=[copies[0]]), model)
    fit(trainer(callbacks=[make()]), again)
    assert same(outcome(model), outcome(again))


@every_callback
def test_hooks_are_gone_after_an_exception_anywhere(make: Callable[[], Any]) -> None:
    class Breaks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1:
                raise Stop
            return loss

    model = Breaks()
    with pytest.raises(Stop):
        fit(trainer(callbacks=[make()]), model)
    assert hooks(model) == 0


class Change(Callback):
    """Calls ``action(model, batch)`` before the callbacks that come after it see a batch."""

    def __init__(self, action: Callable[[Any, int], Any]) -> None:
        self.action = action

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.action(pl_module, batch_idx)


@every_callback
def test_layers_added_and_removed_are_noticed(make: Callable[[], Any]) -> None:
    def change(model: Any, batch: int) -> None:
        if batch == 1:
            model.net.insert(4, nn.Linear(8, 8))  # what was the last layer is "net.5" now
        elif batch == 2:
            del model.net[4]

    model, callback = Net(), make()
    fit(trainer(callbacks=[Change(change), callback]), model)
    assert set(seen(callback)) == {"net.0", "net.2", "net.4", "net.5"}
    known = seen(callback)["net.5"]
    assert known.get("fits", known.get("calls")) == 1
    assert hooks(model) == 0


def test_a_layer_in_the_place_of_another_is_fitted_anew() -> None:
    """The threshold of the layer before is not its own."""

    def change(model: Any, batch: int) -> None:
        if batch == 2:
            model.net[4] = nn.Linear(8, 3)

    callback = MAKES["pruning"]()
    fit(trainer(callbacks=[Change(change), callback]), Net())
    assert {name: layer["next_fit"] for name, layer in seen(callback).items()} == {
        "net.0": 100,
        "net.2": 100,
        "net.4": 102,
    }


@every_callback
def test_a_layer_thawed_later_is_seen(make: Callable[[], Any]) -> None:
    class Thaws(Net):
        def on_train_start(self) -> None:
            self.net[0].requires_grad_(False)

        def on_train_epoch_end(self) -> None:
            self.net[0].requires_grad_(True)

    callback = make()
    fit(trainer(callbacks=[callback], max_epochs=2), Thaws())
    known = seen(callback)
    assert known["net.0"].get("fits", known["net.0"].get("calls")) == 4
    assert known["net.4"].get("fits", known["net.4"].get("calls")) == 8


@every_callback
@pytest.mark.parametrize("options", [{"log_every_n_steps": 0}, {"barebones": True}], ids=str)
def test_it_trains_without_logging(make: Callable[[], Any], options: dict[str, Any]) -> None:
    results = []
    for given in (options, {}):
        model = Net()
        if "barebones" in given:
            small = dict(accelerator="cpu", devices=1, max_epochs=1, limit_val_batches=0)
            runner = Trainer(**small, **given, callbacks=[make()])
        else:
            runner = trainer(callbacks=[make()], **given)
        fit(runner, model)
        results.append(outcome(model))
    assert same(*results)


@every_callback
def test_two_steps_in_a_batch_do_not_hide_measurements(make: Callable[[], Any]) -> None:
    """Steps 0, 2, 4 begin batches: neither of them is the one before an even one."""
    logged: dict[str, Any] = {}

    class Look(Callback):
        def on_train_end(self, trainer: Trainer, *_: Any) -> None:
            logged.update(trainer.callback_metrics)

    callback = GradientStatistics(every_n_steps=2) if isinstance(make(), GradientStatistics) else make()
    fit(trainer(callbacks=[callback, Look()], log_every_n_steps=2), Manual(raw=False, optimizers=2))
    assert any(key.startswith("eff/") for key in logged)
