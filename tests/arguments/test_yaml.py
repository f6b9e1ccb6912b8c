"""Every class of a Trainer through jsonargparse's YAML and through LightningCLI: made, or refused by name."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from lightning_eff.errors import EffError
from tests.arguments.classes import CALLS, REQUIRED, every_lightning_class, literals, options_of, public, used
from tests.arguments.values import YAML


def parser(cls: type[Any]) -> Any:
    from jsonargparse import ArgumentParser

    base = next(base for base in cls.__mro__ if base.__module__.startswith("lightning.pytorch"))
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--thing", type=base)
    return made


def through_yaml(cls: type[Any], options: dict[str, Any]) -> Any:
    """The object jsonargparse makes, or None where it or the class says why not."""
    from jsonargparse import ArgumentError

    reader = parser(cls)
    given = {**REQUIRED.get(cls.__name__, {}), **options}
    text = json.dumps({"thing": {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": given}})
    try:
        return reader.instantiate_classes(reader.parse_string(text)).thing
    except (ArgumentError, EffError):
        return None


def _yaml(cls: type[Any], calls: int) -> None:
    draw = random.Random(cls.__name__)
    names = options_of(cls)
    assert type(through_yaml(cls, {})).__name__ == cls.__name__
    for _ in range(calls):
        chosen = draw.sample(names, k=draw.randint(1, min(3, len(names))))
        thing = through_yaml(
            cls, {name: draw.choice([*literals(get_type_hints(cls.__init__).get(name)), *YAML]) for name in chosen}
        )
        if thing is not None:
            used(thing)


@every_lightning_class
def test_through_yaml(cls: type[Any]) -> None:
    _yaml(cls, 40)


@pytest.mark.long
@every_lightning_class
def test_much_through_yaml(cls: type[Any]) -> None:
    _yaml(cls, CALLS)


REFUSED = {"BF16Precision": {"update": "splt"}, "LowPrecision": {"options": {"levels": 99}}}
"""Options of LightningCLI that are refused; of other classes the timeout or the steps between two things."""


@pytest.mark.parametrize("good", [True, False])
@every_lightning_class
def test_through_lightnings_command_line(
    cls: type[Any], good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringModel

    monkeypatch.setattr("sys.argv", ["app.py"])
    steps = [name for name in options_of(cls) if name.endswith(("_steps", "timeout_s"))][-1:]
    wrong = REFUSED.get(cls.__name__) or dict.fromkeys(steps, -5) or {"steps": -5}
    options = {**REQUIRED.get(cls.__name__, {}), **({} if good else wrong)}
    thing = {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": options}
    kind = next(kind for kind in ("precision", "strategies", "callbacks") if cls in set(public(kind)))
    given = {"strategy": thing} if kind == "strategies" else {"plugins" if kind == "precision" else kind: [thing]}
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    (tmp_path / "config.yaml").write_text(json.dumps({"trainer": {**quiet, **given}}))
    told = contextlib.nullcontext() if good else pytest.raises((SystemExit, ValueError))  # jsonargparse wraps ours
    with told as caught:
        app = LightningCLI(BoringModel, run=False, args=["--config", str(tmp_path / "config.yaml")])
        assert cls.__name__ in app.parser.dump(app.config)
    if not good:
        name = "levels" if cls.__name__ == "LowPrecision" else next(iter(wrong))
        assert name in str(caught.value) + capsys.readouterr().err
