"""Building the kernels in tests: compilers made of shell, and processes that start anew."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from lightning_eff.errors import FallbackWarning
from lightning_eff.kernels import build

kernels_only = pytest.mark.skipif(build.library() is None, reason="no compiled kernels here")


def environment(folder: Path, **changes: str) -> dict[str, str]:
    root = str(Path(build.__file__).parents[2])
    inherited = {name: value for name, value in os.environ.items() if name not in ("LIGHTNING_EFF_KERNELS", "CXX")}
    return {**inherited, "LIGHTNING_EFF_CACHE": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **changes}


def script(path: Path, text: str) -> Path:
    """A program to name as the compiler; it runs for every start of the compiler with ``$target`` as the result."""
    path.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ntarget="$2"\n{text}\n')
    path.chmod(0o755)
    return path


def forget() -> None:
    """What another process would not know."""
    for function in (build.obtained, build.library, build.build_key, build.machine_key):
        function.cache_clear()


def started() -> tuple[bool, str]:
    """Whether a new process gets the kernels, and what it is told: one FallbackWarning at most, nothing else."""
    forget()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = build.library() is not None
        assert (build.library() is not None) == found
    assert [warning.category for warning in seen] in ([], [FallbackWarning])
    return found, " ".join(str(warning.message) for warning in seen)


def copying(tmp_path: Path, prebuilt: Path, text: str = "") -> Path:
    """A compiler that notes that it was started and copies the library."""
    return script(tmp_path / "copying-c++", f'echo started >> {tmp_path}/log\n{text}\ncp {prebuilt} "$target"')


def times_compiled(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0
