"""Who reached which collective: when one fails, the ranks that are missing are named.

When a rank hangs or ends, a collective fails on the others and says that a connection was closed or that time ran out,
but not whose fault it is. So every rank notes in the process group's store, just before it joins a collective, how far
it has come: one key per rank, overwritten every time, so that the store does not grow. Nobody reads the notes until a
collective has failed.

With NCCL a collective only queues work on the device. A failure shows later, in another call or in the watchdog thread
that ends the process, and is not named here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from lightning_eff.errors import RankLostError

__all__ = ["RollCall"]

READ_S = 1.0
"""How long the store has to answer; the process that keeps it may be the one that hangs."""
SHOWN = 8
"""Ranks that are named one by one."""


class RollCall:
    """Notes of all ranks on how far they have come, in the store that the default process group was formed over.

    A note costs about 30 microseconds: the store need not answer it. Every rank makes the same calls in the same order,
    as with collectives.

    Args:
        name: of the method, the beginning of keys and messages. Made anew, a roll call begins with the first note; a
            collective between that and the first call keeps old notes of the same name from being read.

    Example:
        roll_call = RollCall("dropcompute")
        with roll_call("optimizer step 3"):
            dist.all_reduce(tensor)
    """

    def __init__(self, name: str) -> None:
        self.name, self.rank, self.world = name, dist.get_rank(), dist.get_world_size()
        self.calls = 0
        self._store = _tcp_store() if self.world > 1 else None
        self.note("the beginning")

    @contextmanager
    def __call__(self, where: str) -> Iterator[None]:
        """Note that this rank has come to ``where``; name the missing if the collectives in the block fail.

        Raises:
            RankLostError: instead of the RuntimeError of the collective, which is its cause.
        """
        self.calls += 1
        try:
            self.note(where)
            yield
        except RuntimeError as error:  # torch.distributed raises it and classes derived from it
            if self.world == 1:
                raise
            raise RankLostError(
                f"{self.name}: the ranks did not come together at {where}, where rank {self.rank} was. "
                f"{self._missing()} (The collective said: {_first_line(error)})"
            ) from error

    def note(self, where: str) -> None:
        """Note that this rank has come to ``where``, after ``calls`` calls: for one between two calls."""
        if self._store is not None:
            self._store.set(self._key(self.rank), f"{self.calls} {where}")

    def _key(self, rank: int) -> str:
        return f"{self.name}/{rank}"

    def _missing(self) -> str:
        """Return one or two sentences on who did not come."""
        if self._store is None:
            return "Who was not is not known, because the process group was not formed over a TCPStore."
        keeper = "torchrun's agent" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
        notes = _read_soon(self._store, [self._key(rank) for rank in range(self.world)])
        if isinstance(notes, RuntimeError):
            return (
                f"{keeper.capitalize()} has ended or cannot be reached: the store in which the ranks note how far they "
                f"have come, which {keeper} keeps, is gone ({_first_line(notes)})."
            )
        if notes is None:
            return (
                f"{keeper.capitalize()} hangs or cannot be reached: the store in which the ranks note how far they "
                f"have come, which {keeper} keeps, does not answer within {READ_S:g} s."
            )
        seen = {rank: note.partition(" ") for rank, note in enumerate(notes)}
        late = [(rank, where) for rank, (calls, _, where) in seen.items() if int(calls or -1) < self.calls]
        if not late:
            return (
                "So was every other rank: one has ended since, has lost its connection, or had given up waiting. Look "
                "for the first error in the output of the others."
            )
        told = [f"rank {rank} ({'last seen at ' + where if where else 'never seen'})" for rank, where in late[:SHOWN]]
        more = f" and {len(late) - SHOWN} more" if len(late) > SHOWN else ""
        return (
            f"Missing: {', '.join(told)}{more}. It hangs or has ended: look for an error in its output. If it was only "
            "late, allow for it with a longer timeout_s."
        )


def _tcp_store() -> Any:
    """The store under the default group's prefixes, with them, if it is one that keeps a key only once."""
    store: Any = dist.distributed_c10d._get_default_store()
    under = store
    while isinstance(under, dist.PrefixStore):
        under = under.underlying_store
    return store if isinstance(under, dist.TCPStore) else None


def _read_soon(store: Any, keys: list[str]) -> list[str] | RuntimeError | None:
    """The values of ``keys`` ("" where there is none), the error of the store, or None if it does not answer in time.

    In a thread, because a request to a process that hangs does not return.
    """
    found: list[list[str] | RuntimeError] = []

    def read() -> None:
        try:
            if store.check(keys):
                values = store.multi_get(keys)
            else:
                values = [store.get(key) if store.check([key]) else b"" for key in keys]
            found.append([value.decode() for value in values])
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=read, name="roll-call", daemon=True)
    thread.start()
    thread.join(READ_S)
    return found[0] if found else None


def _first_line(error: RuntimeError) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
