"""The monitor: what it measures, what it recommends, that it changes nothing, resume, both namespaces."""

from __future__ import annotations

import importlib
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from torch import Tensor

from lightning_eff.callbacks import GradientPruning, GradientStatistics
from lightning_eff.errors import ConfigurationError, NoEffectWarning
from tests.callbacks.gradients.models import ROOTS, Lognormal, Net, images, parameters, trainer, vectors
from tests.harness import run_ranks

KEY = "eff/gradient_statistics/"


def rendered(monitor: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(monitor.table())
    return out.getvalue()


@pytest.mark.parametrize(("octaves", "bits", "split"), [(2.5, 8, "1-4-3"), (5.0, 8, "1-5-2"), (2.0, 4, "1-3-0")])
def test_it_measures_and_recommends(
    octaves: float, bits: int, split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = GradientStatistics(2, bits)
    run = trainer(tmp_path, monitor)
    run.fit(Lognormal(octaves * math.log(2), zeros=0.25), vectors(7))
    values = {key.removeprefix(KEY): float(value) for key, value in run.callback_metrics.items()}
    assert values["sigma_log2"] == pytest.approx(octaves, rel=0.02)
    assert values["zeros"] == pytest.approx(0.25, abs=0.01)
    assert values["exponent_bits"] == int(split[2])
    assert set(run.callback_metrics) == set(GradientStatistics.info.metrics)
    (layer,) = monitor.state_dict()["layers"].values()
    assert layer["fits"] == 3
    printed = capsys.readouterr().out
    assert split in printed
    assert f"{octaves:.1f}" in printed
    assert "25." in printed or "24." in printed


def test_it_changes_nothing(tmp_path: Path) -> None:
    def run(*callbacks: Callback) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(5)
        model = Net()
        trainer(tmp_path, *callbacks, accumulate_grad_batches=2).fit(model, images())
        assert not any(layer._forward_hooks for layer in model.modules())
        return parameters(model), torch.get_rng_state()

    plain, state = run()
    found, after = run(GradientStatistics(1))
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert torch.equal(state, after)


def test_a_step_is_measured_once(tmp_path: Path) -> None:
    monitor = GradientStatistics(2)
    trainer(tmp_path, monitor, accumulate_grad_batches=3).fit(Net(), images(192))  # 12 micro-batches, 4 steps
    assert {name: layer["fits"] for name, layer in monitor.state_dict()["layers"].items()} == dict.fromkeys(
        ("conv.0", "conv.2", "head.1", "twice", "last"), 2
    )


def test_resume_continues_the_sums(tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)

    def run(*extra: Callback, ckpt: Path | None = None) -> str:
        torch.manual_seed(5)
        monitor = GradientStatistics(2)
        trainer(tmp_path, monitor, *extra, max_epochs=3).fit(Net(), images(), ckpt_path=ckpt)
        return rendered(monitor)

    whole = run(Save())
    assert run(ckpt=path) == whole
    state = torch.load(path, weights_only=True)["callbacks"]["GradientStatistics"]
    assert set(state) == set(GradientStatistics.info.state_keys)


@pytest.mark.parametrize("root", ROOTS)
def test_it_runs_in_both_namespaces(root: str, tmp_path: Path) -> None:
    pl, facade = importlib.import_module(root), importlib.import_module(ROOTS[root])
    boring = importlib.import_module(f"{root}.demos.boring_classes").BoringModel
    monitor = facade.GradientStatistics(1)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    pl.Trainer(**quiet, max_steps=2, limit_val_batches=0, accelerator="cpu", callbacks=[monitor]).fit(boring())
    assert monitor.state_dict()["layers"]["layer"]["fits"] == 2
    assert "layer" in rendered(monitor)


def test_next_to_pruning_it_sees_the_pruned_gradients(tmp_path: Path) -> None:
    callbacks = [GradientStatistics(1), GradientPruning(0.8, warmup_steps=0)]
    run = trainer(tmp_path, *callbacks)
    run.fit(Lognormal(1.5), vectors(4))
    assert float(run.callback_metrics[KEY + "zeros"]) == pytest.approx(0.8, abs=0.01)


def test_layers_without_a_gradient_are_in_the_table(tmp_path: Path) -> None:
    model = Net()
    model.conv.requires_grad_(False)
    monitor = GradientStatistics(1)
    trainer(tmp_path, monitor).fit(model, images())
    assert monitor.state_dict()["layers"]["conv.0"]["fits"] == 0
    assert "conv.0" in rendered(monitor)


def test_a_run_too_short_to_measure_is_told(tmp_path: Path) -> None:
    with pytest.warns(NoEffectWarning, match="measured nothing: every_n_steps=100"):
        trainer(tmp_path, GradientStatistics()).fit(Net(), images())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(every_n_steps=0), "every_n_steps=0"),
        (dict(every_n_steps=True), "every_n_steps=True"),
        (dict(bits=1), "bits=1"),
        (dict(bits=9), "bits=9"),
        (dict(bits=8.0), r"bits=8\.0"),
        (dict(layers="conv"), "layers='conv'"),
    ],
)
def test_bad_arguments_are_named(options: Any, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        GradientStatistics(**options)


def test_a_pattern_without_layers_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="pattern 'head'.*Did you mean 'head.1'"):
        trainer(tmp_path, GradientStatistics(layers=["head"])).fit(Net(), images())


def _two_ranks(rank: int, world_size: int, path: str) -> int:
    monitor = GradientStatistics(1)
    trainer(Path(path), monitor, devices=world_size, strategy="ddp").fit(Net(), images())
    return int(monitor.state_dict()["layers"]["last"]["fits"])


def test_it_runs_on_two_ranks(tmp_path: Path) -> None:
    assert run_ranks(_two_ranks, 2, str(tmp_path)) == [3, 3]
