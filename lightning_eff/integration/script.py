"""Run a project that may not be touched: its script becomes ``__main__``, with our strings registered.

The module ``lightning_eff._run_script`` is ``__main__`` while the script runs, and the script's path travels in the
environment. Lightning's launcher starts the ranks above 0 as ``python -m <name of __main__'s spec> argv[1:]``, which is
the runner again; children of ``multiprocessing`` with the spawn method import it as ``__mp_main__``, as they would the
script. (``runpy.run_path`` loses both: those processes would start the bare script, without the strings.)
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import CodeType
from typing import Any

from lightning_eff.errors import ConfigurationError

__all__ = ["SCRIPT_VARIABLE", "check_target", "prepare", "run_script"]

SCRIPT_VARIABLE = "LIGHTNING_EFF_SCRIPT"
"""Environment variable with the script's absolute path, or ``"-m package.module"``."""

_RUNNER = "lightning_eff._run_script"


def check_target(target: str, *, as_module: bool) -> None:
    """Find the script or module that is to be run.

    Raises:
        ConfigurationError: there is no such file or module.
    """
    if as_module:
        sys.path.insert(0, str(Path.cwd()))
        _module_spec(target)
    elif not Path(target).is_file():
        raise ConfigurationError(f"There is no script {target!r} in {Path.cwd()}. For a module write: run -m {target}")


def run_script(target: str, arguments: Sequence[str], *, as_module: bool = False) -> None:
    """Run a script, or with ``as_module`` a module as ``python -m`` would, with the strings registered."""
    os.environ[SCRIPT_VARIABLE] = f"-m {target}" if as_module else str(Path(target).resolve())
    sys.argv = [target, *arguments]
    runpy.run_module(_RUNNER, run_name="__main__", alter_sys=True)


def prepare(namespace: dict[str, Any]) -> CodeType:
    """Make ``namespace`` look like that of a fresh ``__main__`` and return the script's code.

    Called by the runner, in the first process and in every process that Lightning or ``multiprocessing`` starts.
    """
    target = os.environ.get(SCRIPT_VARIABLE)
    if target is None:
        raise ConfigurationError("Nothing to run. Write: python -m lightning_eff run SCRIPT [ARGUMENTS]")
    if target.startswith("-m "):
        code, file, package = _load_module(target.removeprefix("-m "))
        folder = str(Path.cwd())
    else:
        code = compile(Path(target).read_bytes(), target, "exec", dont_inherit=True)
        file, package, folder = target, "", str(Path(target).parent)
    if folder not in sys.path[:1]:
        sys.path.insert(0, folder)
    sys.argv[0] = file
    for name in [name for name in namespace if not name.startswith("__")]:
        del namespace[name]
    namespace.update(__file__=file, __package__=package, __doc__=None, __cached__=None)
    return code


def _module_spec(name: str) -> Any:
    """Return the spec ``python -m name`` would run: a package stands for its ``__main__``."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError:
        spec = None
    if spec is None or not hasattr(spec.loader, "get_code"):
        raise ConfigurationError(f"There is no module {name!r} that can be run. For a file write: run path/to/file.py")
    return spec


def _load_module(name: str) -> tuple[CodeType, str, str]:
    spec = _module_spec(name)
    # __spec__ must stay the runner's, so that child processes start it; Python would remark on the difference.
    warnings.filterwarnings("ignore", message="__package__ != __spec__.parent")
    return spec.loader.get_code(spec.name), str(spec.origin), str(spec.parent)
