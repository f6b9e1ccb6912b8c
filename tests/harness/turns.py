"""Turns of the test processes: ordinary tests run side by side, a test marked ``alone`` has the machine to itself.

Two files are locked: whoever wants a turn holds the first while it waits for the second, so that a test that wants to
be alone waits only for those that run already. Without other processes there is nothing to wait for.
"""

from __future__ import annotations

import fcntl
from pathlib import Path


class Turns:
    """The turns of one test process among those that share a folder."""

    def __init__(self, folder: Path) -> None:
        self._queue = (folder / "queue").open("w")
        self._machine = (folder / "machine").open("w")
        self._alone = False

    def begin(self, *, alone: bool) -> None:
        """Wait until this process may run a test, ``alone`` or beside the others."""
        if self._alone and alone:  # the last test has left the machine to this one
            return
        fcntl.flock(self._queue, fcntl.LOCK_EX)
        fcntl.flock(self._machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self._queue, fcntl.LOCK_UN)
        self._alone = alone

    def end(self, *, alone_next: bool) -> None:
        """Let the others go on, unless the next test of this process wants to be alone as well."""
        if not (self._alone and alone_next):
            fcntl.flock(self._machine, fcntl.LOCK_UN)
            self._alone = False
