"""The time limit of a test: when it is over, the stacks of all threads are printed and the process ends.

A timer for every test would be a thread for every test, which a busy machine starts late. So one timer is set, and set
anew only when it has run for some seconds. It needs no lock of the interpreter: a test that hangs in C++ ends as well.
"""

from __future__ import annotations

import faulthandler
import time
from typing import IO, Any

LIMIT_S = 120.0
LATER_S = 10.0
"""A test has its limit and at most this much more."""


class Limit:
    """The timer of one test process; the stacks go to ``file``, which has a descriptor."""

    def __init__(self, file: IO[Any]) -> None:
        self._file = file
        self._end = 0.0

    def begin(self, limit_s: float = LIMIT_S) -> None:
        """Let the process end when the test that begins now has exceeded its limit."""
        now = time.monotonic()
        if not now + limit_s <= self._end <= now + limit_s + LATER_S:
            faulthandler.dump_traceback_later(limit_s + LATER_S, exit=True, file=self._file)
            self._end = now + limit_s + LATER_S

    def lift(self) -> None:
        """Let the process wait for as long as it must."""
        faulthandler.cancel_dump_traceback_later()
        self._end = 0.0

    def close(self) -> None:
        """Watch no more tests."""
        self.lift()
        self._file.close()
