"""The wheel holds what the package needs at run time, and nothing else."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from the tree, without network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("lightning_eff-*.whl")
    return zipfile.ZipFile(path).namelist()


def in_tree(pattern: str) -> set[str]:
    return {file.relative_to(ROOT).as_posix() for file in ROOT.glob(pattern)}


@pytest.mark.parametrize(
    "pattern",
    [
        "lightning_eff/**/*.py",
        "lightning_eff/cards/*.md",
        "lightning_eff/kernels/src/*.cpp",
        "lightning_eff/kernels/src/*.h",
        "lightning_eff/py.typed",
    ],
)
def test_the_wheel_holds(wheel: list[str], pattern: str) -> None:
    assert in_tree(pattern)
    assert in_tree(pattern) <= set(wheel)


def test_the_hydra_plugin_is_a_namespace_member(wheel: list[str]) -> None:
    plugins = {name for name in wheel if name.startswith("hydra_plugins/")}
    assert plugins == in_tree("hydra_plugins/*.py") != set()
    assert "hydra_plugins/__init__.py" not in plugins


def test_the_wheel_holds_nothing_else(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lightning_eff", "hydra_plugins"}
    assert [name for name in wheel if "__pycache__" in name or name.endswith((".so", ".o"))] == []
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_the_malicious_lightning_uploads_are_excluded() -> None:
    required = importlib.metadata.requires("lightning-eff") or []
    for package in ("lightning", "pytorch-lightning"):
        lines = [line for line in required if re.match(rf"{package}\b(?!-)", line)]
        assert lines
        assert all("!=2.6.2" in line and "!=2.6.3" in line for line in lines)
