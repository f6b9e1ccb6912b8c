"""Find the C++ compiler and have it make the library, whatever it prints, however it ends, if it ends.

``$CXX`` may hold arguments (``ccache g++``); without it, g++, clang++ and c++ are looked for.
"""

from __future__ import annotations

import functools
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

_SRC = Path(__file__).parent / "src"
SOURCES, HEADERS = sorted(_SRC.glob("*.cpp")), sorted(_SRC.glob("*.h"))
FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=c++17"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
_PROBE = """
import ctypes, sys
try:
    ctypes.CDLL(sys.argv[1])
except OSError as error:
    sys.exit(str(error))
"""
_PROBE_LIMIT_S = 60.0


class CompilerError(Exception):
    """The compiler is missing or made no library that can be loaded; the message is one for people."""


class Compiler(NamedTuple):
    """The words of the compiler's command (none if there is no compiler), and what is wrong with ``$CXX``."""

    command: tuple[str, ...]
    complaint: str


def asked_compiler() -> str:
    """Return ``$CXX``; empty if it is unset."""
    return os.environ.get("CXX", "").strip()


def find_compiler() -> Compiler:
    """Return the compiler of ``$CXX``, or the first of g++, clang++ and c++ that is there."""
    complaint = ""
    if asked := asked_compiler():
        words = [asked] if shutil.which(asked) else _words(asked)  # a path may hold spaces and be no list of words
        if words and (program := shutil.which(words[0])):
            return Compiler((program, *words[1:]), "")
        complaint = f"CXX={asked!r} names no program that can be run. "
    found = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
    return Compiler((found,) if found else (), complaint)


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a quotation mark without its partner
        return []


@functools.cache
def openmp_of_torch() -> tuple[str, ...]:
    """Return link arguments for the OpenMP runtime inside the torch wheel, if it brings one."""
    import torch

    root = Path(torch.__file__).parent
    for folder in (root / "lib", root.parent / "torch.libs"):
        for library in sorted(folder.glob("libgomp*.so*")):
            return str(library), f"-Wl,-rpath,{folder}"
    return ()


def compile_library(compiler: Compiler, folder: Path, limit_s: float) -> Path:
    """Make the library in ``folder``, which takes everything unfinished, too, and open it once.

    Raises:
        CompilerError: there is no such compiler, it fails, hangs or makes nothing that can be loaded.
    """
    if not compiler.command:
        raise CompilerError(
            f"{compiler.complaint}No C++ compiler was found (looked for $CXX, g++, clang++, c++). Install one."
        )
    built = folder / "kernels.so"
    command = [*compiler.command, *FLAGS, *_wide_vectors(), *map(str, SOURCES), "-o", str(built), *openmp_of_torch()]
    _run(command, folder, limit_s)
    name = shlex.join(compiler.command)
    if not built.is_file():
        raise CompilerError(f"{name} reported success and made no library.")
    try:
        _probe(built)
    except CompilerError as error:
        raise CompilerError(f"{name} made a library that cannot be loaded: {error}") from error
    return built


def _wide_vectors() -> list[str]:
    return ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []


def _probe(built: Path) -> None:
    """Open a fresh library in a process of its own: one that kills its process must not kill this one."""
    if not Path(sys.executable or "").name.startswith(("python", "pypy")):
        return  # inside an application that embeds Python; starting that again could do anything
    _run([sys.executable, "-S", "-c", _PROBE, str(built)], built.parent, _PROBE_LIMIT_S, cwd=built.parent)


def _run(command: list[str], folder: Path, limit_s: float, cwd: Path | None = None) -> None:
    """Run a program to its end, or end it and its children; a CompilerError tells what it printed."""
    with tempfile.TemporaryFile(dir=folder) as output:  # a pipe would stay open as long as any grandchild
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, "TMPDIR": str(folder)},
                start_new_session=True,
            )
        except OSError as error:
            raise CompilerError(f"{command[0]} cannot be run: {error}.") from error
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired as error:
            raise CompilerError(f"{command[0]} did not end within {limit_s:.0f} s.") from error
        finally:
            _end(process)
        if status:
            output.seek(max(output.seek(0, os.SEEK_END) - 2000, 0))
            printed = output.read().decode("utf-8", errors="replace").strip()
            ended = f"failed with status {status}" if status > 0 else f"was killed by signal {-status}"
            raise CompilerError(f"{command[0]} {ended}: {printed or 'it printed nothing'}.")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that still runs, with the group it leads."""
    if process.poll() is not None:
        return
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
