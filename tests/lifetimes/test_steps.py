"""Every step of every optimizer is seen once, whoever takes it, also by optimizers that are made or grow later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn

import lightning_eff.precision
from lightning_eff.errors import NonFiniteGradientError, UnsupportedCombinationError
from lightning_eff.optim.bf16.wrapper import ShadowedOptimizer
from lightning_eff.optim.steps import STEPS
from tests.lifetimes.subjects import (
    Manual,
    Net,
    Subject,
    every_subject,
    fit,
    outcome,
    same,
    trainer,
)


@pytest.mark.parametrize("optimizers", [1, 2])
@every_subject()
def test_raw_optimizers_are_seen_like_lightnings(subject: Subject, optimizers: int) -> None:
    results = []
    for raw in (False, True):
        instance, model = subject.make(), Manual(raw, optimizers)
        fit(trainer(**subject.given(instance), max_epochs=2), model)
        results.append(outcome(model, instance))
    assert same(*results)


@every_subject()
def test_optimizers_made_anew_during_the_run_are_seen(subject: Subject) -> None:
    """``setup_optimizers`` again, before the second epoch; they are used raw, so nobody tells of them."""

    class Anew(Manual):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.strategy.setup_optimizers(self.trainer)

    results = []
    for raw in (False, True):
        instance, model = subject.make(), Anew(raw)
        fit(trainer(**subject.given(instance), max_epochs=2), model)
        results.append(outcome(model, instance))
        optimizer = model.trainer.optimizers[0]
        assert isinstance(optimizer, ShadowedOptimizer) == subject.in_bfloat16
    assert same(*results)


class Grows(Net):
    """A backbone that is thawed while the run goes on; its parameters become a group of the optimizer then."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([self.backbone(batch[0]), batch[1]], batch_idx)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, lr=0.05)


@every_subject()
def test_a_parameter_group_added_later_is_trained(subject: Subject, tmp_path: Path) -> None:
    options = subject.given(subject.make())
    options["callbacks"] = [BackboneFinetuning(1, verbose=False), *options.get("callbacks", [])]
    model = Grows()
    before = model.backbone[0].weight.detach().clone()
    runner = trainer(**options, max_epochs=3)
    fit(runner, model)
    assert len(runner.optimizers[0].param_groups) == 2
    assert not torch.equal(model.backbone[0].weight.float(), before)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    runner.save_checkpoint(tmp_path / "grown.ckpt")


@every_subject()
def test_closures_evaluated_several_times(subject: Subject) -> None:
    """LBFGS, through Lightning and raw: alike, or refused before anything has changed."""

    class Several(Net):
        def __init__(self, raw: bool) -> None:
            super().__init__()
            self.automatic_optimization, self.raw = not raw, raw

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not self.raw:
                return self.loss(batch)

            def closure() -> Any:
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.step(closure)
            return None

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    results = []
    for raw in (False, True):
        instance, model = subject.make(), Several(raw)
        before = outcome(model)
        runner = trainer(**subject.given(instance))
        if subject.in_bfloat16:
            with pytest.raises(UnsupportedCombinationError, match="LBFGS evaluates its closure several times"):
                fit(runner, model)
            assert all(torch.equal(p.bfloat16(), q) for p, q in zip(before[0], outcome(model)[0], strict=True))
            continue
        fit(runner, model)
        results.append(outcome(model, instance))
    assert not results or same(*results)


@pytest.mark.parametrize("with_closure", [False, True])
@every_subject(lambda subject: not subject.is_callback and not subject.in_bfloat16)
def test_the_guard_looks_at_raw_steps(subject: Subject, with_closure: bool) -> None:
    class Poisoned(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)

            def closure() -> Any:
                optimizer.zero_grad()
                loss = self.loss(batch) * (torch.nan if batch_idx == 2 else 1.0)
                self.manual_backward(loss)
                return loss

            if batch_idx == 2:
                self.before = outcome(self)
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()

    model = Poisoned(raw=True)
    with pytest.raises(NonFiniteGradientError, match="at optimizer step 2"):
        fit(trainer(**subject.given(subject.make())), model)
    assert same(model.before, outcome(model))


@every_subject(lambda subject: subject.in_bfloat16)
def test_an_optimizer_nobody_knows_of_is_refused_where_it_would_lose_updates(subject: Subject) -> None:
    class Hidden(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.before = outcome(self)
            self.manual_backward(self.loss(batch))
            torch.optim.Adam(self.parameters()).step()

    model = Hidden(raw=True)
    with pytest.raises(UnsupportedCombinationError, match=r"Adam that is not one of the Trainer's.*bf16_updates"):
        fit(trainer(**subject.given(subject.make())), model)
    assert same(model.before, outcome(model))


@every_subject(lambda subject: not subject.is_callback and not subject.in_bfloat16)
def test_a_raw_step_in_the_closure_of_another_is_looked_at(subject: Subject) -> None:
    """Automatic optimization, and a second optimizer that the training step steps by itself."""

    class Second(Net):
        def on_fit_start(self) -> None:
            self.second = torch.optim.SGD(self.net[2].parameters(), lr=0.01)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            (self.loss(batch) * (torch.nan if batch_idx == 2 else 1.0)).backward()
            counts.append(self.trainer.precision_plugin._steps)
            if batch_idx == 2:
                self.before = outcome(self)
            self.second.step()
            self.zero_grad()
            return super().training_step(batch, batch_idx)

    model, counts = Second(), []
    with pytest.raises(NonFiniteGradientError, match="at optimizer step 4"):
        fit(trainer(**subject.given(subject.make())), model)
    assert counts == [0, 2, 4]
    assert same(model.before, outcome(model))


def test_two_models_with_equal_names_in_one_fabric() -> None:
    """Each learns its own scales."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="fp8-delayed")
    nets = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
    models = [fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01)) for net in nets]
    for size, (model, optimizer) in zip((1.0, 100.0), models, strict=True):
        fabric.backward(model(torch.ones(2, 4) * size).sum())
        optimizer.step()
    plugin = fabric._precision
    memories = [state.histories["input"].estimate.max_abs for state in plugin.states().values()]
    assert len(memories) == 2
    assert memories[1] > 10 * memories[0] > 0
    STEPS.remove(plugin)


def test_fabric_looks_when_the_closure_has_made_the_gradients() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="luq4")
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))
    before = outcome(net)

    def closure() -> Any:
        loss = model(torch.ones(2, 4)).sum() * torch.nan
        fabric.backward(loss)
        return loss

    for step in (optimizer.step, optimizer.optimizer.step):
        with pytest.raises(NonFiniteGradientError):
            step(closure)
    assert same(before, outcome(net))
    STEPS.remove(fabric._precision)


def test_figures_are_sampled_with_raw_optimizers() -> None:
    for raw in (False, True):
        instance = lightning_eff.precision.LUQPrecision(measure_every_n_steps=2)
        fit(trainer(plugins=[instance]), Manual(raw))
        assert set(instance.metrics) == set(instance.info.metrics)
