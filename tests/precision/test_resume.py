"""Checkpoints: a run cut in the middle continues to the same bits, with and without the method on either side."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_eff.errors import EffWarning
from tests.precision.models import NAMESPACES, ResumableLoader, parameters_of, task, trainer

CUTS = (1, 5, 8, 11)  # the first step, mid-epoch, epoch end, mid-epoch of the second
KEY = "LUQPrecision"


def plugin(root: str, **options: Any) -> Any:
    home = "lightning_eff" if root == "lightning.pytorch" else "lightning_eff.pytorch_lightning"
    return importlib.import_module(home).LUQPrecision(**options)


def run(
    folder: Path,
    root: str = "lightning.pytorch",
    *,
    resume: Path | None = None,
    cut: int | None = None,
    options: dict[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    **trainer_options: Any,
) -> Any:
    """Sixteen steps in two epochs, or up to ``cut``; a checkpoint ``cut.ckpt`` is written after ``cut`` steps."""

    class Save(importlib.import_module(f"{root}.callbacks").Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == cut:
                trainer.save_checkpoint(folder / "cut.ckpt")

    model = task(root)
    torch.manual_seed(3 if resume is None else 4)  # a resumed run starts from another seed
    if "precision" not in trainer_options:
        trainer_options["plugins"] = [plugin(root, **(options or {}))]
    runner = trainer(root, max_epochs=2, max_steps=cut or -1, callbacks=[*callbacks, Save()], **trainer_options)
    keyword = {"weights_only": True} if resume is not None and _accepts_weights_only(runner) else {}
    runner.fit(model, ResumableLoader(), ckpt_path=None if resume is None else str(resume), **keyword)
    return model


def _accepts_weights_only(runner: Any) -> bool:
    import inspect

    return "weights_only" in inspect.signature(runner.fit).parameters


@pytest.mark.parametrize("root", NAMESPACES)
@pytest.mark.parametrize("cut", CUTS)
def test_a_run_cut_anywhere_continues_to_the_same_bits(tmp_path: Path, root: str, cut: int) -> None:
    whole = run(tmp_path, root)
    run(tmp_path, root, cut=cut)
    continued = run(tmp_path, root, resume=tmp_path / "cut.ckpt")
    assert len(continued.losses) == 16 - cut
    assert continued.losses == whole.losses[cut:]
    assert torch.equal(parameters_of(continued), parameters_of(whole))


@pytest.mark.parametrize(
    "options",
    [{"hindsight": 0.5}, {"samples": 2}, {"levels": 8}, {"hindsight": 0.5, "power_of_two": True, "unsigned": False}],
    ids=str,
)
@pytest.mark.parametrize("precision", [None, "bf16-mixed"])
def test_options_resume_as_well(tmp_path: Path, options: dict[str, Any], precision: str | None) -> None:
    def go(**more: Any) -> Any:
        if precision is None:
            return run(tmp_path, options=options, **more)
        callback = importlib.import_module("lightning_eff").LowPrecision("luq4", options)
        return run(tmp_path, precision=precision, callbacks=[callback], **more)

    whole = go()
    go(cut=5)
    continued = go(resume=tmp_path / "cut.ckpt")
    assert continued.losses == whole.losses[5:]
    assert torch.equal(parameters_of(continued), parameters_of(whole))


@pytest.mark.parametrize(("key", "broken"), [("calls", 0), ("seed", 1), ("memory", {}), ("phase", "weights_only")])
def test_each_key_of_the_state_is_needed(tmp_path: Path, key: str, broken: Any) -> None:
    """Negative control: with one key lost, the comparison above sees a difference."""
    options = {"hindsight": 0.5}
    whole = run(tmp_path, options=options)
    run(tmp_path, cut=8, options=options)
    checkpoint = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    assert set(checkpoint[KEY]) == {"calls", "seed", "memory", "phase"}
    assert checkpoint[KEY][key] != broken
    checkpoint[KEY][key] = broken
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    told = pytest.warns(EffWarning, match="the resume is not exact") if key == "memory" else contextlib.nullcontext()
    with told:
        continued = run(tmp_path, resume=tmp_path / "broken.ckpt", options=options)
    assert not torch.equal(parameters_of(continued), parameters_of(whole))


def test_the_state_is_plain_numbers(tmp_path: Path) -> None:
    run(tmp_path, cut=5, options={"hindsight": 0.5})
    state = torch.load(tmp_path / "cut.ckpt", weights_only=True)[KEY]
    assert state["seed"] == 3
    assert state["calls"] == 2 * 5
    assert state["phase"] == "quantized"
    assert set(state["memory"]) == {"net.2", "net.4"}
    assert all(roles["grad"]["value"] > 0 for roles in state["memory"].values())


@pytest.mark.parametrize("root", NAMESPACES)
def test_the_method_is_added_to_and_taken_from_a_run(tmp_path: Path, root: str) -> None:
    run(tmp_path, root, cut=5)
    plain = run(tmp_path, root, resume=tmp_path / "cut.ckpt", precision="32-true")
    assert len(plain.losses) == 11
    run(tmp_path, root, cut=5, precision="32-true")
    assert KEY not in torch.load(tmp_path / "cut.ckpt", weights_only=True)
    quantised = run(tmp_path, root, resume=tmp_path / "cut.ckpt", precision="luq4")
    assert len(quantised.losses) == 11
    assert plain.losses[-1] != quantised.losses[-1]


def test_one_namespace_resumes_the_other(tmp_path: Path) -> None:
    whole = run(tmp_path)
    run(tmp_path, "lightning.pytorch", cut=5)
    continued = run(tmp_path, "pytorch_lightning", resume=tmp_path / "cut.ckpt")
    assert torch.equal(parameters_of(continued), parameters_of(whole))


def test_sampled_figures_resume_on_the_same_steps(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import Logger

    def steps_of(**more: Any) -> list[int]:
        logged: list[int] = []

        class Memory(Logger):
            name, version = "memory", 0

            def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
                if "eff/luq4/grad_zeros" in metrics:
                    logged.append(step or 0)

            def log_hyperparams(self, *_: Any) -> None: ...

        run(tmp_path, options={"measure_every_n_steps": 3}, logger=Memory(), default_root_dir=tmp_path, **more)
        return logged

    whole = steps_of()
    assert whole == [3, 6, 9, 12, 15]
    steps_of(cut=5)
    assert steps_of(resume=tmp_path / "cut.ckpt") == [6, 9, 12, 15]
