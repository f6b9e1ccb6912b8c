"""The arrows between the package's parts point one way; the style rules a linter cannot see hold."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.import_graph import FLOORS, PACKAGE, module_name

FILES = sorted(PACKAGE.rglob("*.py"))

# A part may import itself and the parts of lower levels. Parts of equal level are siblings and never meet.
LEVELS = {part: level for level, parts in enumerate(FLOORS) for part in parts}
# The facades hold public names. They may import integration (which imports no Lightning by itself) when they are
# imported, and everything else only inside functions, so that `import lightning_eff` stays light.
FACADES = {"__init__", "pytorch_lightning"}
FACADE_AT_IMPORT = {"errors", "methods", "integration"}
# Parts that are tensors in, tensors out: what they may import besides the standard library and lower parts.
PURE = {"functional": {"torch"}, "kernels": {"torch", "triton"}, "errors": set(), "checks": set(), "methods": set()}
# Private names of Lightning's that this package reads, sets or overrides: only integration/ may know them.
OF_LIGHTNING = frozenset({
    "_LRCallback", "_TunerExitException", "_accelerator_connector", "_broadcast_sigterm_tensor", "_callback_connector",
    "_callback_metrics", "_checkpoint_connector", "_compiler_ctx", "_configure_launcher", "_data_connector",
    "_ddp_kwargs", "_every_n_train_steps", "_forward_redirection", "_get_process_group_backend",
    "_init_dist_connection", "_launcher", "_layer_sync", "_lightning_module", "_lightning_optimizers",
    "_logger_connector", "_precision_plugin", "_results", "_signal_connector", "_tensor_parallel_size", "_timeout",
    "_train_time_interval", "epoch_loop", "val_loop",
})  # fmt: skip
# A name of Lightning's modules that objects of this package have as well, for themselves.
OF_BOTH = frozenset({"_trainer"})


def part_of(module: str) -> str:
    """``lightning_eff.precision.luq`` is in the part ``precision``; the package itself is the facade ``__init__``."""
    _, _, rest = module.partition(".")
    return rest.split(".", maxsplit=1)[0] or "__init__"


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, bool]]:
    """Every imported module name and whether importing ``module`` imports it (False inside functions)."""
    lazy = {id(child) for node in ast.walk(tree) if isinstance(node, _LAZY) for child in ast.walk(node)}
    lazy |= {id(child) for node in ast.walk(tree) if _is_type_checking(node) for child in ast.walk(node)}
    for node in ast.walk(tree):
        eager = id(node) not in lazy
        if isinstance(node, ast.Import):
            yield from ((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: None if is_package and node.level == 1 else -node.level + is_package]
                base = ".".join([*above, base]).rstrip(".")
            if base == "lightning_eff":  # `from lightning_eff import errors` imports the part, not the facade
                for alias in node.names:
                    is_part = alias.name in LEVELS or alias.name in FACADES
                    yield (f"lightning_eff.{alias.name}" if is_part else base), eager
            else:
                yield base, eager


_LAZY = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def import_faults(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module's source."""
    part = part_of(module)
    faults = []
    if part not in LEVELS and part not in FACADES:
        faults.append(f"{module}: {part} is not one of the package's parts")
    for name, eager in imported(ast.parse(source), module, is_package):
        if name.split(".")[0] == "lightning_eff":
            if not _may_import(part, part_of(name), eager):
                faults.append(f"{module} imports {name}")
        elif part in PURE:
            top = name.split(".")[0]
            if top not in PURE[part] and top not in sys.stdlib_module_names:
                faults.append(f"{module} imports {name}")
    return faults


def _may_import(part: str, target: str, eager: bool) -> bool:
    if part == target:
        return True
    if part in FACADES:
        return target in FACADE_AT_IMPORT or not eager
    if target in FACADES:  # only what stands above all parts may use the public names
        return LEVELS.get(part, 0) >= LEVELS["compose"]
    return LEVELS.get(target, 99) < LEVELS.get(part, 0)


def style_faults(source: str, name: str) -> list[str]:
    """Rules of the house that are about one file alone."""
    tree = ast.parse(source)
    faults = []
    if source.strip() and not ast.get_docstring(tree):
        faults.append(f"{name}: no module docstring")
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            faults.append(f"{name}:{node.lineno}: assert; raise a typed error")
        if isinstance(node, ast.ExceptHandler) and _swallows(node):
            faults.append(f"{name}:{node.lineno}: an exception is swallowed; name it and say why, or let it rise")
    return faults


def private_lightning_faults(source: str, module: str) -> list[str]:
    """Where a module outside integration knows a private name of Lightning's, as an attribute or as a string."""
    if part_of(module) == "integration":
        return []
    return [
        f"{module}:{getattr(node, 'lineno', 0)}: {name} is Lightning's own; a function of integration/ can ask for it"
        for node in ast.walk(ast.parse(source))
        if (name := _of_lightning(node))
    ]


def _of_lightning(node: ast.AST) -> str:
    """The private name of Lightning's that a node has, or nothing."""
    if isinstance(node, ast.Attribute):
        is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        return node.attr if node.attr in OF_LIGHTNING or (node.attr in OF_BOTH and not is_own) else ""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # getattr, setattr, replace_attribute
        return node.value if node.value in OF_LIGHTNING | OF_BOTH else ""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):  # overridden
        return node.name if node.name in OF_LIGHTNING else ""
    return ""


def _swallows(handler: ast.ExceptHandler) -> bool:
    broad = handler.type is None or (
        isinstance(handler.type, ast.Name) and handler.type.id in ("Exception", "BaseException")
    )
    return broad and all(isinstance(node, (ast.Pass, ast.Continue)) for node in handler.body)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down_and_style_holds(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    faults = import_faults(source, module_name(file), is_package=file.name == "__init__.py")
    assert faults + style_faults(source, file.name) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lightning_eff.functional.numerics.luq", "import lightning"),
        ("lightning_eff.functional.numerics.luq", "import numpy as np"),
        ("lightning_eff.functional.numerics.luq", "from lightning_eff.kernels import gemm"),
        ("lightning_eff.functional.numerics.luq", "from ...precision import luq"),
        ("lightning_eff.functional.numerics.luq", "def f():\n    import matplotlib"),
        ("lightning_eff.kernels.gemm", "from lightning.pytorch import Trainer"),
        ("lightning_eff.kernels.gemm", "from lightning_eff import LUQPrecision"),
        ("lightning_eff.precision.luq", "from lightning_eff.callbacks.monitor import Monitor"),
        ("lightning_eff.precision.luq", "from lightning_eff import strategies"),
        ("lightning_eff.integration.registry", "def f():\n    from lightning_eff import precision"),
        ("lightning_eff.plan", "import lightning_eff.testing"),
        ("lightning_eff", "from lightning_eff.precision import LUQPrecision"),
        ("lightning_eff.methods", "import torch"),
        ("lightning_eff.helpers", "import os"),
    ],
)
def test_the_checker_flags_a_bad_import(module: str, source: str) -> None:
    assert import_faults(source, module) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "lightning_eff.functional.numerics.luq",
            "import torch\nfrom lightning_eff.functional import rounding",
        ),
        ("lightning_eff.functional.numerics.luq", "from . import rounding\nfrom ...errors import EffError"),
        ("lightning_eff.kernels.gemm", "from lightning_eff.functional.numerics.luq import luq_codes"),
        ("lightning_eff.precision.luq", "import lightning\nfrom lightning_eff import errors"),
        ("lightning_eff.precision", "def __getattr__(name):\n    from lightning_eff import integration"),
        ("lightning_eff", "from lightning_eff.integration import install"),
        ("lightning_eff", "def __getattr__(name):\n    from lightning_eff.precision import LUQPrecision"),
        ("lightning_eff.__main__", "import lightning_eff\nfrom lightning_eff import plan"),
    ],
)
def test_the_checker_lets_a_good_import_pass(module: str, source: str) -> None:
    assert import_faults(source, module) == []


@pytest.mark.parametrize(
    "source",
    [
        "x = 1",
        '"""Doc."""\nassert True',
        '"""Doc."""\ntry:\n    x = 1\nexcept Exception:\n    pass',
    ],
)
def test_the_checker_flags_bad_style(source: str) -> None:
    assert style_faults(source, "x.py") != []


def test_private_names_of_lightning_are_known_in_integration_alone() -> None:
    sources = {module_name(file): file.read_text(encoding="utf-8") for file in FILES}
    assert [fault for name, text in sources.items() for fault in private_lightning_faults(text, name)] == []


@pytest.mark.parametrize(
    "source",
    [
        "trainer._logger_connector.epoch_end_reached()",
        "trainer.fit_loop.epoch_loop.max_steps += 1",
        "self._layer_sync = None",
        "getattr(self, '_layer_sync', None)",
        "trainer = getattr(module, '_trainer', None)",
        "module._trainer = trainer",
        "replace_attribute(loop, '_broadcast_sigterm_tensor', f)",
        "class S(StrategyBase):\n    def _configure_launcher(self): ...",
        "any(type(callback).__name__ == '_LRCallback' for callback in callbacks)",
    ],
)
def test_the_checker_flags_private_names_of_lightning(source: str) -> None:
    assert private_lightning_faults(source, "lightning_eff.strategies.new.strategy") != []
    assert private_lightning_faults(source, "lightning_eff.integration.loop") == []


@pytest.mark.parametrize(
    "source",
    ["self._trainer = trainer", "trainer.fit_loop.total_batch_idx", "x = 'the _trainer of a module'", "self._sum()"],
)
def test_the_checker_lets_public_and_own_names_pass(source: str) -> None:
    assert private_lightning_faults(source, "lightning_eff.strategies.new.strategy") == []


@pytest.mark.parametrize("module", ["lightning_eff.functional", "lightning_eff.kernels", "lightning_eff"])
def test_importing_pulls_in_nothing_heavy(module: str) -> None:
    heavy = ["lightning", "pytorch_lightning", "lightning_fabric", "hydra", "jsonargparse", "matplotlib", "deepspeed"]
    code = f"import sys, {module}; print(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
