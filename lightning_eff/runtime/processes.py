"""Processes beside this one: whether another rank's still lives, and loader workers that end with their rank."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["EndWithParent", "lives", "lost_a_loader_worker", "this_process"]

LOOK_S = 0.2
"""How often a loader worker looks whether its rank is there."""


def this_process() -> str:
    """Return the name of this process: machine, number, start; empty where the system does not tell (no Linux)."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        numbers = str(Path("/proc/self/ns/pid").readlink())  # process numbers of a container are its own
        _, started = _state_and_start(os.getpid())
    except OSError:
        return ""
    return f"{machine} {numbers} {os.getpid()} {started}"


def lives(process: str) -> bool | None:
    """Return whether a process that :func:`this_process` named lives; None if it runs where that cannot be seen."""
    *place, number, started = process.split(" ") if process else ("", "", "")
    if place != this_process().split(" ")[:-2]:
        return None
    try:
        state, found = _state_and_start(int(number))
    except OSError:
        return False
    return found == started and state not in "ZX"


def _state_and_start(number: int) -> tuple[str, str]:
    fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return fields[0], fields[19]


class EndWithParent:
    """Lets a loader worker end soon after its rank, as a ``worker_init_fn``.

    A forked worker holds copies of its rank's connections: as long as it lives, the other ranks do not learn that the
    rank was killed. torch's own workers look for it every 5 seconds.

    Args:
        then: the ``worker_init_fn`` that was there.
    """

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        """Watch the rank from a thread, then call the ``worker_init_fn`` that was there."""
        threading.Thread(target=_end_with, args=(os.getppid(),), name="rank-watch", daemon=True).start()
        if self.then is not None:
            self.then(worker)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)


def lost_a_loader_worker(error: BaseException) -> bool:
    """Return whether an error says that a worker of a DataLoader has ended, or broke off what it was sending."""
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return True
    if not isinstance(error, OSError | EOFError):
        return False
    frames: list[Any] = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(code.co_name == "_try_get_data" and code.co_filename.endswith("dataloader.py") for code in frames)
