"""The public names, frozen: taking one away breaks somebody's import, and adding one is meant."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from types import ModuleType

import pytest

PRECISION = (
    *("BF16EmulatedPrecision", "BF16Precision", "DFP16Precision", "FP8Precision", "FittedPrecision"),
    *("FlexpointPrecision", "LUQPrecision"),
)
STRATEGIES = ("DropComputeStrategy", "PipelinedBPStrategy")
CALLBACKS = ("GradientPruning", "GradientStatistics", "LUQFineTuning", "LowPrecision", "NonFiniteGuard")
CLASSES = (*PRECISION, *STRATEGIES, *CALLBACKS)
NAMES = {
    "lightning_eff": ("METHODS", "MethodInfo", "__version__", "bf16_updates", *CLASSES),
    "lightning_eff.precision": PRECISION,
    "lightning_eff.strategies": STRATEGIES,
    "lightning_eff.callbacks": CALLBACKS,
    "lightning_eff.pytorch_lightning": CLASSES,
}
SUBMODULES = (
    *("callbacks", "checks", "errors", "functional", "integration", "kernels", "methods", "optim", "plan", "precision"),
    *("pytorch_lightning", "runtime", "strategies"),
)


@pytest.mark.parametrize("module", NAMES)
def test_the_names_are_these_and_can_be_imported(module: str) -> None:
    if module.endswith("pytorch_lightning"):
        pytest.importorskip("pytorch_lightning")
    found = importlib.import_module(module)
    assert sorted(found.__all__) == sorted(NAMES[module])
    for name in NAMES[module]:
        assert getattr(found, name) is not None
        assert name in dir(found)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_one_whichever_way_it_is_asked_for_and_pickles(name: str) -> None:
    pytest.importorskip("pytorch_lightning")
    front, other = importlib.import_module("lightning_eff"), importlib.import_module("lightning_eff.pytorch_lightning")
    made = getattr(front, name)
    assert made is getattr(importlib.import_module(made.__module__), name)
    assert made is not getattr(other, name)
    assert made.__mro__[1] is getattr(other, name).__mro__[1], "the same mixin in front of either Lightning"
    for cls in (made, getattr(other, name)):
        assert (cls.__name__, cls.__qualname__) == (name, name)
        assert pickle.loads(pickle.dumps(cls)) is cls
        assert cls.__doc__


@pytest.mark.parametrize("name", SUBMODULES)
def test_a_part_is_reached_without_importing_it_by_name(name: str) -> None:
    import lightning_eff

    assert isinstance(getattr(lightning_eff, name), ModuleType)
    assert name in dir(lightning_eff)


def test_what_is_not_there_is_an_attribute_error() -> None:
    import lightning_eff

    with pytest.raises(AttributeError, match="'lightning_eff' has no attribute 'LUQPrecison'"):
        lightning_eff.LUQPrecison  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError):
        exec("from lightning_eff import Nonsense")


CODE = """
import sys, lightning_eff
heavy = [name for name in ("torch", "lightning", "pytorch_lightning", "numpy") if name in sys.modules]
dir(lightning_eff)
lightning_eff.methods, lightning_eff.errors
print([*heavy, *(name for name in ("torch", "lightning", "pytorch_lightning") if name in sys.modules)])
from lightning_eff import DropComputeStrategy, FP8Precision, GradientPruning, bf16_updates
used = DropComputeStrategy, FP8Precision, GradientPruning
print([cls.__name__ for cls in used], "lightning.pytorch" in sys.modules)
"""


def test_names_cost_nothing_until_they_are_used() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    light, used = done.stdout.strip().splitlines()
    assert light == "[]"
    assert used == "['DropComputeStrategy', 'FP8Precision', 'GradientPruning'] True"
