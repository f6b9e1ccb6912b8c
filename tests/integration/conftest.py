"""Fixtures of the integration tests: the demo method, a Trainer that is quiet and small, fresh interpreters."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lightning_eff
from lightning_eff.methods.info import ROWS
from tests.integration import demo_shell

collect_ignore = ["scripts", "third_party"]  # projects to be run, not modules to be searched for doctests
ROOT = Path(lightning_eff.__file__).parents[1]
SCRIPTS = Path(__file__).parent / "scripts"
ROOTS = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}


@pytest.fixture(autouse=True)
def demo_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the demo rows known, next to the real ones."""
    for info in (demo_shell.INFO, demo_shell.OTHER):
        monkeypatch.setitem(ROWS, info.name, info)


@pytest.fixture(params=list(ROOTS))
def ns(request: pytest.FixtureRequest) -> SimpleNamespace:
    """One Lightning: its root module, strategies, plugins, callbacks, Fabric, and a way to make a small Trainer."""
    root = request.param
    pl = importlib.import_module(root)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    small = dict(accelerator="cpu", devices=1, max_steps=2, limit_val_batches=0)

    def trainer(**kwargs: Any) -> Any:
        return pl.Trainer(**{**quiet, **small, **kwargs})

    parts = {part: importlib.import_module(f"{root}.{part}") for part in ("strategies", "plugins", "callbacks")}
    fabric = importlib.import_module(ROOTS[root]).Fabric
    return SimpleNamespace(root=root, pl=pl, trainer=trainer, fabric=fabric, model=_model(root), **parts)


def _model(root: str) -> type[Any]:
    boring = importlib.import_module(f"{root}.demos.boring_classes").BoringModel

    class Model(boring):
        seen: tuple[str, ...] = ()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            self.seen = (*self.seen, type(self.layer).__name__)
            return super().training_step(batch, batch_idx)

    return Model


def run_python(
    *arguments: str, cwd: Path, timeout: float = 100, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter with this package importable and return what it did."""
    env = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")}
    path = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env.update(PYTHONPATH=path, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", **environment)
    return subprocess.run(
        [python, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


def reports(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Return the lines of JSON a test script has printed, after checking that it ended well."""
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def make_environment(folder: Path, *requirements: str) -> str:
    """Make a virtual environment with this torch and the given packages; return its interpreter.

    torch comes first, so that nothing brings another; torchvision is left out on purpose (no CPU build on PyPI).
    """
    python = str(folder / "bin" / "python")
    torch_requirement = f"torch=={torch.__version__.partition('+')[0]}"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*install, torch_requirement],
        [*install, torch_requirement, *requirements],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-3000:]}"
    return python
