"""Faults of a rank that tests of every strategy bring about, and how soon the others have to know."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

TIMEOUT_S = 2.5
"""Of collectives and messages, where a rank hangs; all have imported everything by then, or the first takes longer."""


REPORTED_S = 2.0
"""Reliability promise: a rank's death is an error on the others after at most this time."""


ENDED_S = 15.0
"""What a whole interpreter gets to clean up and exit; the default timeout is 1800 s."""


class OwnError(Exception):
    """What the user's code raises."""


def _die(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _exit(folder: Path) -> None:
    os._exit(3)


def _raise(folder: Path) -> None:
    raise OwnError("of the user's code")


def _hang(folder: Path) -> None:
    """Until the other ranks have noticed, so that the pool need not kill this one."""
    while len(list(folder.glob("seen*"))) < int(os.environ["WORLD_SIZE"]) - 1:
        time.sleep(0.02)


def _freeze(folder: Path) -> None:
    """The whole process, with the store if it is rank 0 that keeps it."""
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS = {"die": _die, "exit": _exit, "raise": _raise, "hang": _hang, "freeze": _freeze}


WAITED_FOR = {"hang", "freeze"}
