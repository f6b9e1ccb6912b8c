"""Install the libraries we compare with, in an environment of their own: ``python -m benchmarks.peers setup``.

QPyTorch, Brevitas and torchao pin or pull packages that do not belong in a development environment (Brevitas an old
setuptools, QPyTorch a C++ extension compiled at its first import). A benchmark that is asked for a peer restarts itself
with that environment's Python, so that the peer and ours are timed side by side in one process.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = Path(os.environ.get("LIGHTNING_EFF_PEERS", ROOT / ".venv-peers"))
MODULES = {"qpytorch": "qtorch", "brevitas": "brevitas", "torchao": "torchao", "torchao-rowwise": "torchao"}
REQUIREMENTS = ("qtorch==0.3.0", "ninja", "brevitas==0.13.4", "torchao==0.18.0", "rich", "scikit-learn")
HOW = "python -m benchmarks.peers setup"

__all__ = ["ENVIRONMENT", "MODULES", "enter", "missing"]


def missing(variants: Iterable[str]) -> list[str]:
    """Return the peers among ``variants`` that cannot be imported here.

    Example:
        >>> missing(["fp32", "luq4"])
        []
    """
    return [v for v in variants if v in MODULES and importlib.util.find_spec(MODULES[v]) is None]


def python() -> Path | None:
    """Return the Python of the peers' environment, or None when it was not set up."""
    found = ENVIRONMENT / "bin" / "python"
    return found if found.exists() else None


def enter(module: str, variants: Iterable[str]) -> None:
    """Restart ``python -m module`` in the peers' environment when a wanted peer lives only there.

    Does not return in that case.

    Raises:
        SystemExit: a peer was asked for that is not installed anywhere.
    """
    wanted = missing(variants)
    if not wanted:
        return
    interpreter = python()
    if interpreter is None or Path(sys.prefix).resolve() == ENVIRONMENT.resolve():
        raise SystemExit(f"{', '.join(wanted)}: not installed. Run `{HOW}` first or leave it out of --variants.")
    sys.stdout.flush()
    search = os.pathsep.join((str(interpreter.parent), os.environ.get("PATH", "")))  # where QPyTorch finds ninja
    os.execve(interpreter, [str(interpreter), "-m", module, *sys.argv[1:]], {**os.environ, "PATH": search})


def installed_version(package: str) -> str:
    """Return this environment's version of ``package`` without its local part (``2.13.0+cpu`` -> ``2.13.0``)."""
    from importlib.metadata import version

    return version(package).partition("+")[0]


def setup(index: str | None) -> None:
    """Create the environment: the torch and lightning of this one, then the peers."""
    venv.create(ENVIRONMENT, with_pip=True)
    pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install"]
    source = [] if index is None else ["--index-url", index]
    # torch first and alone: a peer that resolves it by itself may pull another build.
    subprocess.run([*pip, *source, f"torch=={installed_version('torch')}"], check=True)
    subprocess.run([*pip, f"lightning=={installed_version('lightning')}", *REQUIREMENTS], check=True)
    print(f"Ready: {ENVIRONMENT}. QPyTorch compiles its extension at the first import (about a minute).")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("action", choices=["setup", "show"])
    parser.add_argument("--torch-index", help="package index for torch, e.g. https://download.pytorch.org/whl/cpu")
    options = parser.parse_args()
    if options.action == "setup":
        setup(options.torch_index)
    else:
        print(python() or f"not set up: run `{HOW}`")


if __name__ == "__main__":
    main()
