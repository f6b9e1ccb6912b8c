"""``Trainer(precision="luq4")`` from outside: what it trains, restores, reports and refuses."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff.errors import ConfigurationError, EffWarning, NoEffectWarning, NonFiniteGradientError
from lightning_eff.precision.layers.linear import LinearTwin
from tests.precision.models import NAMESPACES, body, fit, loader, parameters_of, task, trainer

PRECISIONS = ("luq4", "luq4+bf16-mixed", "luq4+bf16-true")


def plugin(root: str, **options: Any) -> Any:
    """An instance of the public class of one namespace."""
    home = "lightning_eff" if root == "lightning.pytorch" else "lightning_eff.pytorch_lightning"
    return importlib.import_module(home).LUQPrecision(**options)


@pytest.mark.parametrize("root", NAMESPACES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_trains_and_the_same_seed_gives_the_same_bits(root: str, precision: str) -> None:
    seen = []

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        seen.append([isinstance(layer, LinearTwin) for layer in self.net])

    model, _ = fit(root, precision=precision, max_epochs=6, hooks={"on_train_batch_start": on_train_batch_start})
    assert seen[0].count(True) == 2
    assert sum(model.losses[-8:]) < 0.9 * sum(model.losses[:8])
    again, _ = fit(root, precision=precision, max_epochs=6)
    assert torch.equal(parameters_of(model), parameters_of(again))
    assert model.losses == again.losses
    other, _ = fit(root, precision=precision, max_epochs=6, seed=4)
    assert not torch.equal(parameters_of(model), parameters_of(other))
    plain, _ = fit(root, precision=precision.partition("+")[2] or None, max_epochs=6)
    assert not torch.equal(parameters_of(model), parameters_of(plain))
    assert [type(layer) for layer in model.net] == [type(layer) for layer in body()]


def test_the_two_namespaces_compute_the_same() -> None:
    first, second = (fit(root, precision="luq4")[0] for root in NAMESPACES)
    assert torch.equal(parameters_of(first), parameters_of(second))


def test_string_and_plugin_compute_the_same() -> None:
    string, _ = fit(precision="luq4")
    instance, _ = fit(plugins=[plugin("lightning.pytorch")])
    assert torch.equal(parameters_of(string), parameters_of(instance))
    levels, _ = fit(plugins=[plugin("lightning.pytorch", levels=8)])
    assert not torch.equal(parameters_of(string), parameters_of(levels))


def test_the_users_random_stream_is_untouched() -> None:
    states = []
    for precision in (None, "luq4"):
        fit(precision=precision)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("root", NAMESPACES)
@pytest.mark.parametrize("where", ["training_step", "on_before_optimizer_step", "validation_step"])
def test_types_are_given_back_after_an_exception(root: str, where: str) -> None:
    class BrokenError(Exception):
        pass

    def broken(self: Any, *_: Any) -> None:
        assert any(isinstance(layer, LinearTwin) for layer in self.net)
        raise BrokenError

    model = task(root, **{where: broken})
    runner = trainer(root, precision="luq4", limit_val_batches=1, num_sanity_val_steps=1)
    with pytest.raises(BrokenError):
        runner.fit(model, loader(), loader())
    assert [type(layer) for layer in model.net] == [type(layer) for layer in body()]
    assert not any("_eff_state" in layer.__dict__ for layer in model.net)


def poisoned(at: int) -> dict[str, Any]:
    """A training step whose loss is NaN in micro-batch ``at``."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if batch_idx == at:
            self.before = parameters_of(self)
        return self.loss(batch) * (torch.nan if batch_idx == at else 1.0)

    return {"training_step": training_step}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_nan_loss_never_reaches_a_parameter(precision: str) -> None:
    model, runner = task(**poisoned(3)), trainer(precision=precision)
    with pytest.raises(NonFiniteGradientError, match=r"at optimizer step 3 \(rank 0\) in 8 of 8.*net\.2\.weight"):
        runner.fit(model)
    assert torch.equal(parameters_of(model), model.before)
    assert type(model.net[2]) is nn.Linear


def test_a_nan_in_accumulated_gradients_is_seen() -> None:
    model, runner = task(**poisoned(2)), trainer(precision="luq4", accumulate_grad_batches=4)
    with pytest.raises(NonFiniteGradientError, match="optimizer step 0"):
        runner.fit(model)
    assert torch.equal(parameters_of(model), model.before)


def test_a_nan_before_clipping_is_seen() -> None:
    model, runner = task(**poisoned(3)), trainer(precision="luq4", gradient_clip_val=0.1)
    with pytest.raises(NonFiniteGradientError):
        runner.fit(model)


def test_a_nan_born_outside_the_converted_layers_is_seen() -> None:
    """Between the first layer, in high precision, and the rest: only the first layer's gradient is broken."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        hidden = self.net[0](batch[0])
        if batch_idx == 2:
            self.before = parameters_of(self)
            hidden.register_hook(lambda grad: torch.full_like(grad, torch.nan))
        return nn.functional.cross_entropy(self.net[1:](hidden), batch[1])

    model = task(training_step=training_step)
    with pytest.raises(NonFiniteGradientError, match=r"net\.0\.weight"):
        trainer(precision="luq4").fit(model)
    assert torch.equal(parameters_of(model), model.before)


def test_a_nan_can_be_let_through_with_a_warning() -> None:
    model = task(**poisoned(3))
    runner = trainer(plugins=[plugin("lightning.pytorch", on_nonfinite="warn")], max_steps=4)
    with pytest.warns(EffWarning, match=r"at optimizer step 3 .*goes on as asked"):
        runner.fit(model)
    assert parameters_of(model).isnan().any()


@pytest.mark.parametrize("root", NAMESPACES)
def test_a_model_without_layers_to_convert_is_told(root: str) -> None:
    def configure_model(self: Any) -> None:
        self.net = nn.Sequential(nn.Linear(12, 3))

    with pytest.warns(NoEffectWarning, match=r"luq4 converted no layer.*net\.0 \(Linear\): exempt: the first layer"):
        fit(root, precision="luq4", max_steps=1, hooks={"configure_model": configure_model})


def test_a_pattern_that_matches_nothing_is_refused_before_the_first_step() -> None:
    model = task()
    with pytest.raises(ConfigurationError, match="matches no layer"):
        trainer(plugins=[plugin("lightning.pytorch", exempt=["*.head"])]).fit(model)
    assert not model.losses


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"limit_train_batches": 3, "max_epochs": 2},
        {"precision": "luq4+bf16-mixed", "gradient_clip_val": 0.5},
    ],
    ids=str,
)
def test_with_other_options_of_the_trainer(options: dict[str, Any]) -> None:
    model, _ = fit(**{"precision": "luq4", **options})
    again, _ = fit(**{"precision": "luq4", **options})
    assert torch.equal(parameters_of(model), parameters_of(again))
    without, _ = fit(precision=options.get("precision", "luq4"))
    assert not torch.equal(parameters_of(model), parameters_of(without))


def test_accumulated_steps_share_the_weights_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_eff.precision.formats import luq as luq_format

    shapes: list[Any] = []
    original = luq_format.sawb_encode

    def watched(x: Any, **options: Any) -> Any:
        if "pack" not in options:
            shapes.append(x.shape)
        return original(x, **options)

    monkeypatch.setattr(luq_format, "sawb_encode", watched)
    fit(precision="luq4", accumulate_grad_batches=4)  # eight micro-batches, two steps, two converted layers
    assert len(shapes) == 4


def test_averaged_weights_are_validated_with_their_own_codes() -> None:
    callbacks = importlib.import_module("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    values: dict[str, list[float]] = {}

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        stored = [(layer.weight.data.clone(), layer) for layer in self.net if isinstance(layer, LinearTwin)]
        values.setdefault("through the cache", []).append(self.loss(batch).item())
        for _, layer in stored:
            layer._eff_state.invalidate()
        values.setdefault("made anew", []).append(self.loss(batch).item())

    callback = callbacks.EMAWeightAveraging(decay=0.5)
    model = task(validation_step=validation_step)
    runner = trainer(precision="luq4", callbacks=[callback], limit_val_batches=2, max_epochs=2, num_sanity_val_steps=0)
    torch.manual_seed(3)
    runner.fit(model, loader(), loader())
    assert values["through the cache"] == values["made anew"]
    assert len(values["made anew"]) == 4
    plain, _ = fit(precision="luq4", max_epochs=2)
    assert not torch.equal(parameters_of(model), parameters_of(plain))  # the averaged weights stay


@pytest.mark.parametrize("root", NAMESPACES)
def test_validation_and_test_alone_run_in_four_bits(root: str) -> None:
    seen: list[str] = []

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        seen.append(isinstance(self.net[2], LinearTwin))
        self.log("val_loss", self.loss(batch))

    model = task(root, validation_step=validation_step)
    runner = trainer(root, precision="luq4", limit_val_batches=2)
    (quantised,) = runner.validate(model, loader(), verbose=False)
    (tested,) = runner.test(model, loader(), verbose=False)
    (plain,) = trainer(root, limit_val_batches=2).validate(model, loader(), verbose=False)
    assert seen == [True, True, False, False]
    assert quantised["val_loss"] != plain["val_loss"]
    assert quantised["val_loss"] == pytest.approx(plain["val_loss"], rel=0.2)
    assert tested["test_loss"] > 0


def test_fit_twice_and_validate_in_between() -> None:
    model, runner = task(), trainer(precision="luq4", limit_val_batches=1)
    runner.fit(model, loader(), loader())
    runner.validate(model, loader(), verbose=False)
    runner.fit_loop.max_epochs = 2
    runner.fit(model, loader(), loader())
    assert len(model.losses) == 16
    assert type(model.net[2]) is nn.Linear


# ------------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize("every", [0, 2, 3])
def test_figures_are_logged_on_sampled_steps_alone(every: int, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import Logger

    logged: list[tuple[int, dict[str, float]]] = []

    class Memory(Logger):
        name, version = "memory", 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if any(key.startswith("eff/") for key in metrics):
                logged.append((step or 0, metrics))

        def log_hyperparams(self, *_: Any) -> None: ...

    instance = plugin("lightning.pytorch", measure_every_n_steps=every)
    fit(plugins=[instance], logger=Memory(), default_root_dir=tmp_path)
    expected = [step for step in range(1, 8) if every and step % every == 0]
    assert [step for step, _ in logged] == expected
    keys = {"weight_sqnr_db", "input_sqnr_db", "grad_zeros", "grad_saturated"}
    for _, metrics in logged:
        assert set(metrics) == {f"eff/luq4/{key}" for key in keys} == set(instance.info.metrics)
        assert 10 < metrics["eff/luq4/weight_sqnr_db"] < 30
        assert 5 < metrics["eff/luq4/input_sqnr_db"] < 40
        assert 0 < metrics["eff/luq4/grad_zeros"] < 1
        assert 0 < metrics["eff/luq4/grad_saturated"] < 0.5


def test_sampling_figures_does_not_change_the_run() -> None:
    plain, _ = fit(plugins=[plugin("lightning.pytorch", measure_every_n_steps=0)])
    sampled, _ = fit(plugins=[plugin("lightning.pytorch", measure_every_n_steps=1)])
    assert torch.equal(parameters_of(plain), parameters_of(sampled))


def test_the_reports_name_layers_and_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    fit(precision="luq4")
    text = capsys.readouterr().out
    assert "luq4: 2 of 4 layers with weights converted" in text
    assert "exempt: the first layer" in text
    assert "2 layers trained for 8 steps" in text
    assert "(0.1" in text  # packed: an eighth and the scales


# ------------------------------------------------------------------------------------------------------- Fabric


@pytest.mark.parametrize("root", ["lightning.fabric", "lightning_fabric"])
@pytest.mark.parametrize("precision", ["luq4", "luq4+bf16-mixed"])
def test_fabric(root: str, precision: str) -> None:
    module = importlib.import_module(root)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        fabric = module.Fabric(accelerator="cpu", devices=1, precision=precision)
        plain = body()
        model, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
        assert isinstance(plain[2], LinearTwin)
        for x, y in fabric.setup_dataloaders(loader()):
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
        results.append(parameters_of(plain))
    assert torch.equal(*results)
    assert not torch.equal(results[0], parameters_of(body()))
    optimizer.zero_grad()
    fabric.backward(model(x).sum() * torch.nan)
    with pytest.raises(NonFiniteGradientError, match=r"optimizer step 8"):
        optimizer.step()
    assert torch.equal(results[1], parameters_of(plain))
