"""The callback that needs no string: grafts once, composes, refuses what cannot be right."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_eff.errors import ConfigurationError, UnknownMethodError, UnsupportedCombinationError
from lightning_eff.integration.graft import method_of
from tests.state.runs import quiet_trainer, task


@pytest.fixture
def callback(ns: SimpleNamespace) -> type[Any]:
    module = "lightning_eff.callbacks" if ns.root == "lightning.pytorch" else "lightning_eff.pytorch_lightning"
    made: type[Any] = importlib.import_module(module).LowPrecision
    return made


def test_it_converts_without_a_string(ns: SimpleNamespace, callback: type[Any]) -> None:
    trainer, model = ns.trainer(callbacks=[callback("demo4", {"levels": 8})]), ns.model()
    assert method_of(trainer.precision_plugin) is None  # nothing has happened yet
    trainer.fit(model)
    assert model.seen == ("DemoLinear", "DemoLinear")
    assert trainer.precision_plugin.levels == 8


def test_it_composes_with_the_trainers_precision(ns: SimpleNamespace, callback: type[Any]) -> None:
    trainer, model = ns.trainer(precision="bf16-mixed", callbacks=[callback("demo4")]), ns.model()
    trainer.fit(model)
    assert model.seen == ("DemoLinear", "DemoLinear")
    assert isinstance(trainer.precision_plugin, ns.plugins.MixedPrecision)
    assert trainer.precision == "bf16-mixed"


def test_it_acts_once_over_fit_validate_and_test(ns: SimpleNamespace, callback: type[Any]) -> None:
    trainer, model = ns.trainer(callbacks=[callback("demo4", {"levels": 8})], limit_val_batches=1), ns.model()
    trainer.fit(model)
    cls = type(trainer.precision_plugin)
    trainer.validate(model, verbose=False)
    trainer.test(model, verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(model)
    assert type(trainer.precision_plugin) is cls
    assert trainer.precision_plugin.inits == 1
    assert trainer.precision_plugin.calls == 4
    assert len(model.seen) == 4


def test_it_may_stand_next_to_the_same_string(ns: SimpleNamespace, callback: type[Any]) -> None:
    trainer = ns.trainer(precision="demo4", callbacks=[callback("demo4")])
    trainer.fit(ns.model())
    assert trainer.precision_plugin.inits == 1


def test_it_refuses_the_loss_scaler(ns: SimpleNamespace, callback: type[Any]) -> None:
    plugin = ns.plugins.MixedPrecision("16-mixed", "cpu")
    with pytest.raises(UnsupportedCombinationError, match="'16-mixed': the scaler is in the way"):
        ns.trainer(plugins=[plugin], callbacks=[callback("demo4")]).fit(ns.model())


def test_it_refuses_a_strategy(ns: SimpleNamespace, callback: type[Any]) -> None:
    trainer = ns.trainer()
    trainer.strategy.__class__ = type(
        "SomebodysStrategy", (ns.strategies.Strategy,), dict(vars(type(trainer.strategy)))
    )
    with pytest.raises(UnsupportedCombinationError, match=r"SomebodysStrategy \(family 'unknown'\)"):
        callback("demo4").setup(trainer, None, "fit")


def test_it_refuses_other_options_than_are_there(ns: SimpleNamespace, callback: type[Any]) -> None:
    with pytest.raises(ConfigurationError, match="asked for twice"):
        ns.trainer(precision="demo4", callbacks=[callback("demo4", {"levels": 8})]).fit(ns.model())
    with pytest.raises(ConfigurationError, match="no option 'level'"):
        ns.trainer(callbacks=[callback("demo4", {"level": 8})]).fit(ns.model())


def test_a_combined_name_is_checked_against_the_trainer(ns: SimpleNamespace, callback: type[Any]) -> None:
    with pytest.raises(ConfigurationError, match="expects Lightning's precision 'bf16-mixed'.* has '32-true'"):
        ns.trainer(callbacks=[callback("demo4+bf16-mixed")]).fit(ns.model())
    ns.trainer(precision="bf16-mixed", callbacks=[callback("demo4+bf16-mixed")]).fit(ns.model())


def test_an_unknown_method_is_refused_when_written(callback: type[Any]) -> None:
    with pytest.raises(UnknownMethodError, match=r"Did you mean 'luq4'\?"):
        callback("luq44")


def test_the_default_is_the_documented_one(callback: type[Any]) -> None:
    assert (callback().method, callback().options) == ("luq4", {})


@pytest.mark.parametrize("string", ["luq4", "luq4+bf16-mixed", "fp8-fit"])
def test_a_run_has_the_same_bits_as_with_the_string(string: str) -> None:
    from lightning_eff.callbacks import LowPrecision

    method, _, base = string.partition("+")
    ways = {"precision": string}, {"precision": base or "32-true", "callbacks": [LowPrecision(method)]}
    weights = []
    for options in ways:
        torch.manual_seed(3)
        trainer = quiet_trainer(max_steps=6, **options)
        trainer.fit(task("sgd"))
        weights.append([p.detach().clone() for p in trainer.lightning_module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
