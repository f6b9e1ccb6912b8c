"""``lightning_eff.functional`` shows every public function and class of its modules, and nothing else."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import Counter
from types import ModuleType

import pytest

from lightning_eff import functional

FAMILIES = ("numerics", "staleness", "stragglers")
# Constants that are arguments of public functions: formats and the names of roundings.
CONSTANTS = {"E4M3", "E5M2", "FP8_E4M3", "FP8_E5M2", "GRADIENT_ROUNDINGS"}


def modules_below(package: ModuleType) -> list[ModuleType]:
    """The modules of a package and of its families; no packages."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [importlib.import_module(info.name) for info in found if not info.ispkg]


MODULES = modules_below(functional)


def public(module: ModuleType) -> dict[str, object]:
    """The functions and classes that the module defines without an underscore."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }


def faults(face: ModuleType, modules: list[ModuleType]) -> list[str]:
    """What a face lacks, or shows although no module below it defines it."""
    expected = {name: value for module in modules for name, value in public(module).items()}
    shown: list[str] = face.__all__
    wrong = [f"lacks {name}" for name in expected if getattr(face, name, None) is not expected[name]]
    wrong += [f"{name} is not in __all__" for name in expected if name not in shown]
    wrong += [f"shows {name}" for name in shown if name not in expected and name not in CONSTANTS]
    return wrong + [f"lists {name} twice" for name, count in Counter(shown).items() if count > 1]


def test_the_face_shows_all_public_functions_and_classes_and_nothing_else() -> None:
    assert len(MODULES) > 15
    assert faults(functional, MODULES) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_face_shows_its_own(family: str) -> None:
    face = importlib.import_module(f"lightning_eff.functional.{family}")
    assert faults(face, modules_below(face)) == []
    assert set(face.__all__) <= set(functional.__all__)


def test_each_constant_is_one_object_in_all_modules() -> None:
    assert set(functional.__all__) >= CONSTANTS
    for name in CONSTANTS:
        owners = [module for module in MODULES if hasattr(module, name)]
        assert owners, name
        assert all(getattr(module, name) is getattr(functional, name) for module in owners)


def test_no_name_is_defined_twice_and_none_hides_a_module() -> None:
    names = Counter(name for module in MODULES for name in public(module))
    assert [name for name, count in names.items() if count > 1] == []
    assert {part for module in MODULES for part in module.__name__.split(".")[2:]} & set(names) == set()


@pytest.mark.parametrize(
    "module", MODULES, ids=lambda module: module.__name__.removeprefix("lightning_eff.functional.")
)
def test_what_is_shown_is_documented(module: ModuleType) -> None:
    assert [name for name, value in public(module).items() if not inspect.getdoc(value)] == []


def test_the_check_notices_a_missing_and_a_foreign_name() -> None:
    module = ModuleType("module")
    exec("def here(): pass", vars(module))
    vars(module)["here"].__module__ = "module"
    face = ModuleType("face")
    face.__all__ = ["elsewhere"]  # type: ignore[attr-defined]
    assert faults(face, [module]) == ["lacks here", "here is not in __all__", "shows elsewhere"]
