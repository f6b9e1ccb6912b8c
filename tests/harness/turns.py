"""Turns of the test processes: ordinary tests run side by side, a test marked ``alone`` has the machine to itself.

Two files are locked: whoever wants a turn holds the first while it waits for the second, so that a test that wants to
be alone waits only for those that run already. Without other processes there is nothing to wait for.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import IO


class Turns:
    """The turns of one test process among those that share a folder; it calls ``before_waiting`` when it has to."""

    def __init__(self, folder: Path, before_waiting: Callable[[], None] = lambda: None) -> None:
        self._queue = (folder / "queue").open("w")
        self._machine = (folder / "machine").open("w")
        self._before_waiting = before_waiting
        self._alone = False

    def begin(self, *, alone: bool) -> None:
        """Wait until this process may run a test, ``alone`` or beside the others."""
        if self._alone and alone:  # the last test has left the machine to this one
            return
        self._lock(self._queue, fcntl.LOCK_EX)
        self._lock(self._machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self._queue, fcntl.LOCK_UN)
        self._alone = alone

    def end(self, *, alone_next: bool) -> None:
        """Let the others go on, unless the next test of this process wants to be alone as well."""
        if not (self._alone and alone_next):
            fcntl.flock(self._machine, fcntl.LOCK_UN)
            self._alone = False

    def close(self) -> None:
        """Leave the queue."""
        self._queue.close()
        self._machine.close()

    def _lock(self, file: IO[str], kind: int) -> None:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            self._before_waiting()
            fcntl.flock(file, kind)
