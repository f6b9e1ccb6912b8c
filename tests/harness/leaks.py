"""Leak police: what a test must leave as it found it, how that is read, and how it is put back.

Reading costs under a millisecond, so every test is checked. A leak is put back before it is reported: one guilty
test fails, the innocent ones after it do not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 2.0  # how long threads and children may take to end after the test returned

# Set once by torch and its compilers for the rest of the process, which reads them again later: left alone.
KEPT_ENV = ("_TORCHINDUCTOR_", "TORCHINDUCTOR_", "TRITON_", "TORCH_NCCL_", "PYTORCH_NVML_", "KMP_", "PYTEST_")
# Set by lightning.seed_everything: put back in silence.
SILENT_ENV = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
# Caches of the tools that run beside the tests.
TOLERATED_FILES = {
    ".pytest_cache", ".hypothesis", ".mypy_cache", ".ruff_cache", "__pycache__", ".coverage", ".git", "build", "dist",
}  # fmt: skip
# Helper processes that live as long as the interpreter that started them.
TOLERATED_CHILDREN = ("resource_tracker", "compile_worker", "forkserver")


def _set_cudnn(deterministic: bool, benchmark: bool) -> None:
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark


def _set_default_device(device: str) -> None:
    torch.set_default_device(None if device == "cpu" else device)


_Flag = tuple[str, Callable[[], Any], Callable[[Any], Any]]
FLAGS: tuple[_Flag, ...] = (
    ("torch default dtype", torch.get_default_dtype, torch.set_default_dtype),
    ("torch num_threads", torch.get_num_threads, torch.set_num_threads),
    ("torch grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    (
        "torch deterministic algorithms",
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    (
        "cudnn deterministic and benchmark",
        lambda: (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        lambda value: _set_cudnn(*value),
    ),
    ("torch float32 matmul precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    ("torch autocast on cpu", lambda: torch.is_autocast_enabled("cpu"), lambda v: torch.set_autocast_enabled("cpu", v)),
    (
        "torch anomaly detection",
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda value: torch.autograd.set_detect_anomaly(*value),
    ),
    ("torch default device", lambda: str(torch.get_default_device()), _set_default_device),
    ("working folder", lambda: str(Path.cwd()), os.chdir),
)
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")


def child_processes() -> dict[int, str]:
    """Living children of this process: pid to command line; empty where /proc does not tell."""
    found: dict[int, str] = {}
    with contextlib.suppress(OSError):
        for task in os.listdir("/proc/self/task"):  # noqa: PTH208 - for every test: pathlib's globs take milliseconds
            with contextlib.suppress(OSError):
                for pid in Path(f"/proc/self/task/{task}/children").read_text().split():
                    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z":
                        found[int(pid)] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    return found


def _own_children() -> dict[int, str]:
    from tests.harness.ranks import worker_pids

    return {
        pid: command
        for pid, command in child_processes().items()
        if pid not in worker_pids() and not any(word in command for word in TOLERATED_CHILDREN)
    }


def _threads() -> dict[int, str]:
    return {thread.ident or 0: thread.name for thread in threading.enumerate() if not thread.daemon}


def _signal_handlers() -> dict[str, Any]:
    return {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS if hasattr(signal, name)}


@dataclass
class Snapshot:
    """The state a test starts from; :meth:`leaks` compares, puts back and says what differed."""

    env: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    threads: dict[int, str] = field(default_factory=_threads)
    children: dict[int, str] = field(default_factory=_own_children)
    files: set[str] = field(default_factory=lambda: set(os.listdir(ROOT)))  # noqa: PTH208
    handlers: dict[str, Any] = field(default_factory=_signal_handlers)
    flags: dict[str, Any] = field(default_factory=lambda: {name: get() for name, get, _ in FLAGS})

    def leaks(self) -> list[str]:
        """Put everything back and return one line per leak."""
        found = [*self._env(), *self._flags(), *self._handlers(), *self._process_group()]
        found += [f"file left in the repository: {name}" for name in sorted(self._new_files())]
        found += self._waited("non-daemon thread left running", _threads, self.threads)
        found += self._waited("child process left running", _own_children, self.children)
        return found

    def _env(self) -> list[str]:
        found = []
        for name in sorted(self.env.keys() | os.environ.keys()):
            before, after = self.env.get(name), os.environ.get(name)
            if before == after or name.startswith(KEPT_ENV):
                continue
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before
            if name not in SILENT_ENV:
                found.append(f"environment: {name} was {before!r}, is {after!r}")
        return found

    def _flags(self) -> list[str]:
        found = []
        for name, get, put_back in FLAGS:
            if (after := get()) != self.flags[name]:
                put_back(self.flags[name])
                found.append(f"{name}: was {self.flags[name]}, is {after}")
        return found

    def _handlers(self) -> list[str]:
        found = []
        for name, after in _signal_handlers().items():
            if after != self.handlers[name]:
                found.append(f"{name} handler: was {self.handlers[name]}, is {after}")
                if threading.current_thread() is threading.main_thread() and self.handlers[name] is not None:
                    signal.signal(getattr(signal, name), self.handlers[name])
        return found

    def _process_group(self) -> list[str]:
        if not (dist.is_available() and dist.is_initialized()):
            return []
        dist.destroy_process_group()
        return ["default process group left initialised"]

    def _new_files(self) -> set[str]:
        return set(os.listdir(ROOT)) - self.files - TOLERATED_FILES  # noqa: PTH208

    @staticmethod
    def _waited(what: str, read: Callable[[], dict[int, str]], before: dict[int, str]) -> list[str]:
        deadline = time.monotonic() + GRACE_S
        while (new := {key: name for key, name in read().items() if key not in before}) and time.monotonic() < deadline:
            time.sleep(0.02)
        return [f"{what}: {name} ({key})" for key, name in sorted(new.items())]


@contextlib.contextmanager
def keep_globals() -> Iterator[None]:
    """Put torch's flags, the environment, the signal handlers and the process group back, reporting nothing.

    For a test that has to change them, for instance one that trains with ``Trainer(deterministic=True)``.
    """
    before = Snapshot()
    try:
        yield
    finally:
        before._env()
        before._flags()
        before._handlers()
        before._process_group()
