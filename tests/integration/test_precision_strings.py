"""``Trainer(precision=...)`` and ``Fabric(precision=...)`` in both namespaces: what trains and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_eff.errors import ConfigurationError, UnknownMethodError, UnsupportedCombinationError
from lightning_eff.integration.graft import check_strategy, graft, method_of, strategy_family
from tests.integration.demo_shell import INFO, DemoLinear, DemoMixin


@pytest.mark.parametrize(
    ("given", "base_class", "base"),
    [
        ("demo4", "Precision", "32-true"),
        ("DEMO4+bf16-mixed", "MixedPrecision", "bf16-mixed"),
        ("demo4+bf16", "MixedPrecision", "bf16-mixed"),
    ],
)
def test_a_string_trains(ns: SimpleNamespace, given: str, base_class: str, base: str) -> None:
    trainer, model = ns.trainer(precision=given), ns.model()
    trainer.fit(model)
    plugin = trainer.precision_plugin
    assert model.seen == ("DemoLinear", "DemoLinear")
    assert type(model.layer) is torch.nn.Linear  # undone after fit
    assert isinstance(plugin, DemoMixin)
    assert isinstance(plugin, getattr(ns.plugins, base_class))
    assert (trainer.precision, plugin.eff_method, plugin.levels, plugin.inits) == (base, "demo4", 7, 1)


def test_lightnings_own_precisions_are_untouched(ns: SimpleNamespace) -> None:
    for given, expected in ((32, "32-true"), ("32", "32-true"), ("bf16-mixed", "bf16-mixed"), (None, "32-true")):
        trainer = ns.trainer(precision=given)
        assert trainer.precision == expected
        assert method_of(trainer.precision_plugin) is None


def test_two_trainers_do_not_share_a_choice(ns: SimpleNamespace) -> None:
    ns.trainer(precision="demo4")
    assert method_of(ns.trainer().precision_plugin) is None


@pytest.mark.parametrize(
    ("given", "meant"),
    [("demo5", "demo4"), ("luq5", "luq4"), ("bf16-mixd", "bf16-mixed"), ("BF16-mixed", "bf16-mixed")],
)
def test_unknown_names_get_the_nearest(ns: SimpleNamespace, given: str, meant: str) -> None:
    for build in (ns.trainer, ns.fabric):
        with pytest.raises(UnknownMethodError, match=f"Precision '{given}' is invalid. Allowed precision") as caught:
            build(precision=given, accelerator="cpu")
        assert f"Did you mean {meant!r}?" in str(caught.value)
        assert "lightning_eff adds: luq4" in str(caught.value)


@pytest.mark.parametrize("given", ["banana", 7])
def test_names_like_nothing_else_stay_lightnings_error(ns: SimpleNamespace, given: object) -> None:
    with pytest.raises(ValueError, match="is invalid. Allowed precision values: .*'bf16-mixed'") as caught:
        ns.trainer(precision=given)
    assert "Did you mean" not in str(caught.value)


def test_a_forbidden_base_is_refused_with_the_reason(ns: SimpleNamespace) -> None:
    for build in (ns.trainer, ns.fabric):
        with pytest.raises(UnsupportedCombinationError, match="16-mixed.*the scaler is in the way"):
            build(precision="demo4+16-mixed", accelerator="cpu")


def test_string_and_plugin_together_are_refused(ns: SimpleNamespace) -> None:
    ours = graft(ns.plugins.Precision(), "demo4")
    cases: list[dict[str, Any]] = [
        {"precision": "demo4", "plugins": [ns.plugins.Precision()]},
        {"precision": "demo4", "plugins": ns.plugins.Precision()},
        {"precision": "bf16-mixed", "plugins": [ours]},
    ]
    for kwargs in cases:
        with pytest.raises(ConfigurationError, match=r"Received both `precision=.*precision='demo4\+bf16-mixed'"):
            ns.trainer(**kwargs)
    with pytest.raises(ValueError, match="Received both"):  # Lightning's own case stays Lightning's
        ns.trainer(precision="bf16-mixed", plugins=[ns.plugins.Precision()])


def test_other_plugins_may_come_along(ns: SimpleNamespace) -> None:
    trainer = ns.trainer(precision="demo4", plugins=[ns.plugins.TorchCheckpointIO()])
    assert trainer.precision_plugin.eff_method == "demo4"


def test_an_instance_trains(ns: SimpleNamespace) -> None:
    plugin = graft(ns.plugins.Precision(), "demo4", levels=8)
    trainer, model = ns.trainer(plugins=[plugin]), ns.model()
    trainer.fit(model)
    assert model.seen == ("DemoLinear", "DemoLinear")
    assert (plugin.levels, plugin.calls) == (8, 2)


def test_a_strategy_that_brings_its_own_precision(ns: SimpleNamespace) -> None:
    def strategy() -> Any:
        return ns.strategies.SingleDeviceStrategy(precision_plugin=ns.plugins.MixedPrecision("bf16-mixed", "cpu"))

    with pytest.raises(ConfigurationError, match=r"brings its own MixedPrecision.*precision='demo4\+bf16-mixed'"):
        ns.trainer(precision="demo4", strategy=strategy())
    trainer = ns.trainer(precision="demo4+bf16-mixed", strategy=strategy())
    assert (trainer.precision_plugin.eff_method, trainer.precision) == ("demo4", "bf16-mixed")


def test_a_strategy_instance_may_be_used_again(ns: SimpleNamespace) -> None:
    strategy = ns.strategies.SingleDeviceStrategy()
    first = ns.trainer(precision="demo4", strategy=strategy).precision_plugin
    second = ns.trainer(precision="demo4", strategy=strategy, accelerator="auto").precision_plugin
    assert second is first
    assert second.inits == 1


def test_unsupported_strategies_are_refused_at_construction(ns: SimpleNamespace) -> None:
    expected = r"ModelParallelStrategy \(family 'model_parallel'\): weights are DTensors.*Allowed.*single_device, ddp"
    plugin = graft(ns.plugins.Precision(), "demo4")
    for kwargs in ({"precision": "demo4"}, {"plugins": [plugin]}):
        with pytest.raises(UnsupportedCombinationError, match=expected):
            ns.trainer(strategy=ns.strategies.ModelParallelStrategy(), **kwargs)


def test_ddp_is_accepted(ns: SimpleNamespace) -> None:
    for strategy in ("ddp", "ddp_spawn", ns.strategies.DDPStrategy()):
        assert ns.trainer(strategy=strategy, precision="demo4").precision_plugin.eff_method == "demo4"


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (("DDPStrategy", "DeepSpeedStrategy"), "deepspeed"),
        (("DDPStrategy", "XLAStrategy"), "xla"),
        (("SingleDeviceStrategy", "SingleDeviceXLAStrategy"), "xla"),
        (("ParallelStrategy", "FSDPStrategy"), "fsdp"),
        (("ParallelStrategy", "DataParallelStrategy"), "dp"),
        (("DDPStrategy", "FSDPStrategy"), "fsdp"),
        (("DDPStrategy", "SomebodysStrategy"), "ddp"),
        (("ParallelStrategy", "SomebodysStrategy"), "unknown"),
    ],
)
def test_families_go_by_ancestors_and_the_specific_one_wins(names: tuple[str, ...], family: str) -> None:
    made: type[Any] = object
    for name in names:
        made = type(name, (made,), {})
    assert strategy_family(made()) == family
    if family not in INFO.strategies:
        with pytest.raises(UnsupportedCombinationError, match=f"{names[-1]}.*{family}"):
            check_strategy(INFO, made())


def test_fabric_trains(ns: SimpleNamespace) -> None:
    fabric = ns.fabric(precision="demo4+bf16-mixed", accelerator="cpu", devices=1)
    layer = torch.nn.Linear(4, 2)
    module, optimizer = fabric.setup(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    before = layer.weight.detach().clone()
    fabric.backward(module(torch.randn(3, 4)).sum())
    optimizer.step()
    assert type(layer) is DemoLinear
    assert not torch.equal(before, layer.weight)


def test_graft_is_done_once_and_refuses_contradictions(ns: SimpleNamespace) -> None:
    plugin = graft(ns.plugins.Precision(), "demo4", levels=8)
    cls = type(plugin)
    assert graft(plugin, "demo4") is plugin
    assert graft(plugin, "demo4", levels=8) is plugin
    assert (type(plugin), plugin.inits) == (cls, 1)
    with pytest.raises(ConfigurationError, match=r"asked for twice.*\{'levels': 8\}.*\{'levels': 7\}"):
        graft(plugin, "demo4", levels=7)
    with pytest.raises(UnsupportedCombinationError, match="already carries 'demo4'; 'other8' cannot"):
        graft(plugin, "other8")
    with pytest.raises(
        ConfigurationError, match=r"no option 'level'. Did you mean 'levels'\? Its options: levels, smp"
    ):
        graft(ns.plugins.Precision(), "demo4", level=8)


def test_the_environment_default_is_understood(ns: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_TRAINER_PRECISION", "demo4+bf16-mixed")
    trainer = ns.trainer()
    assert (trainer.precision_plugin.eff_method, trainer.precision) == ("demo4", "bf16-mixed")
    assert method_of(ns.trainer(precision="32-true").precision_plugin) is None  # what the code says wins
