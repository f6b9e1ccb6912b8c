"""LightningCLI in both namespaces: strings from the command line and YAML, wrong ones refused while parsing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, get_args

import pytest

from lightning_eff.integration.cli import PrecisionName, widen_precision

Run = Callable[..., Any]


@pytest.fixture
def cli(ns: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that parses arguments and returns the LightningCLI with its Trainer, running nothing."""
    monkeypatch.setattr("sys.argv", ["app.py"])  # LightningCLI remarks on arguments of the test runner
    module = importlib.import_module(f"{ns.root}.cli")
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}

    def run(*args: str) -> Any:
        return module.LightningCLI(ns.model, run=False, args=list(args), trainer_defaults=defaults)

    return run


def test_strings_pass(cli: Run) -> None:
    for given, base in (("demo4", "32-true"), ("demo4+bf16-mixed", "bf16-mixed"), ("DEMO4", "32-true")):
        trainer = cli(f"--trainer.precision={given}").trainer
        assert (trainer.precision_plugin.eff_method, trainer.precision) == ("demo4", base)


def test_lightnings_own_pass(cli: Run) -> None:
    for given, base in (("32", "32-true"), ("bf16-mixed", "bf16-mixed"), ("null", "32-true")):
        trainer = cli(f"--trainer.precision={given}").trainer
        assert trainer.precision == base
        assert not hasattr(trainer.precision_plugin, "eff_method")


def test_yaml_and_what_is_written_back(cli: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    for given, base in (("demo4", "32-true"), ("32", "32-true"), ("bf16-mixed", "bf16-mixed")):
        config.write_text(f"trainer:\n  precision: {given}\n")
        app = cli(f"--config={config}")
        assert app.trainer.precision == base
        assert f"precision: {given}\n" in app.parser.dump(app.config)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("luq5", "Did you mean 'luq4'?"),
        ("bf16-mixd", "Did you mean 'bf16-mixed'?"),
        ("demo4+bf16-mixd", "Did you mean 'demo4+bf16-mixed'?"),
        ("demo4+16-mixed", "the scaler is in the way"),
    ],
)
def test_wrong_names_are_refused_while_parsing(
    cli: Run, given: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli(f"--trainer.precision={given}")
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def test_classes_by_path(cli: Run, ns: SimpleNamespace, tmp_path: Path) -> None:
    standalone = ns.root == "pytorch_lightning"
    where = "lightning_eff.pytorch_lightning" if standalone else "lightning_eff.precision"
    callbacks = "lightning_eff.pytorch_lightning" if standalone else "lightning_eff.callbacks"
    config = tmp_path / "config.yaml"
    config.write_text(
        f"trainer:\n  plugins:\n  - class_path: {where}.LUQPrecision\n"
        f"  callbacks:\n  - class_path: {callbacks}.LowPrecision\n    init_args:\n      method: luq4\n"
    )
    app = cli(f"--config={config}")
    assert app.trainer.precision_plugin.eff_method == "luq4"
    assert f"class_path: {where}.LUQPrecision" in app.parser.dump(app.config)
    config.write_text(f"trainer:\n  plugins:\n  - class_path: {where}.LUQPrecision\n    init_args:\n      levels: 8\n")
    assert cli(f"--config={config}").trainer.precision_plugin.eff_method == "luq4"


def test_an_option_that_does_not_exist_is_refused(
    cli: Run, ns: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = "lightning_eff.pytorch_lightning" if ns.root == "pytorch_lightning" else "lightning_eff.precision"
    config = tmp_path / "config.yaml"
    config.write_text(f"trainer:\n  plugins:\n  - class_path: {where}.LUQPrecision\n    init_args:\n      level: 8\n")
    with pytest.raises(SystemExit):
        cli(f"--config={config}")
    assert "level" in capsys.readouterr().err


def test_widening_adds_to_every_layer_once() -> None:
    def function(precision: Optional[int] = None) -> None: ...  # noqa: UP045 - as Lightning writes it

    def postponed(precision: Any = None) -> None: ...

    postponed.__annotations__["precision"] = "int | None"
    function.__wrapped__ = postponed  # type: ignore[attr-defined]
    for _ in range(2):
        widen_precision(function)
    for layer in (function, postponed):
        assert layer.__annotations__["precision"] == int | None | PrecisionName
        assert get_args(layer.__annotations__["precision"]).count(PrecisionName) == 1
