"""Who reached which collective: when one fails, the ranks that are missing are named, and what became of them.

When a rank hangs or ends, a collective fails on the others and says that a connection was closed or that time ran out,
but not whose fault it is. So every rank notes in the process group's store, just before it joins a collective, how far
it has come, and when an error ends its run, which: two keys per rank, overwritten every time, so that the store does
not grow. Nobody reads the notes until a collective has failed. Who then is missing is whoever raised an error of its
own, or whose process has ended (seen on the same machine), or, if there is no such rank, whoever has come less far or
has not given up waiting as well. A rank that is late is not accused of more: it is said to be alive.

With NCCL a collective only queues work on the device. A failure shows later, in another call or in the watchdog thread
that ends the process, and is not named here.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_eff.errors import EffError, RankLostError
from lightning_eff.runtime.processes import lives, lost_a_loader_worker, this_process

__all__ = ["RollCall", "is_of_a_collective"]

READ_S = 1.0
"""How long the store has to answer; the process that keeps it may be the one that hangs."""
GRACE_S = 0.8
"""How long after a failure the others have to note theirs, if nobody is known to be missing by then."""
STAY_S = 0.5
"""How long the rank that keeps the store stays after an error, for the others to read why."""
SHOWN = 8
"""Ranks that are named one by one."""
_PAUSE_S = 0.02
_RAISED, _WAITED = "raised", "waited"
_OF_GLOO = re.compile(r"\bgloo\b|connect\w*FullMesh", re.IGNORECASE)
_TIMED_OUT = re.compile(r"timed?[ -]?out", re.IGNORECASE)
_IN_USE = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


class _Seen(NamedTuple):
    """Holds what one rank has noted in the store.

    Attributes:
        run: number of the run it is in; 0 if it was never seen.
        calls: collectives it has come to in that run.
        since: when it noted that, by its own clock.
        process: what :func:`~lightning_eff.runtime.processes.this_process` returned there.
        where: the last of them.
        end: "raised" or "waited" if its run has ended with an error, or "".
        why: the error, or where it waited.
    """

    run: int = 0
    calls: int = -1
    since: float = 0.0
    process: str = ""
    where: str = ""
    end: str = ""
    why: str = ""

    @classmethod
    def read(cls, note: str, end: str) -> _Seen:
        if not note:
            return cls()
        run, calls, since, process, where = note.split("\t", 4)
        ended_run, _, rest = end.partition("\t")
        kind, _, why = rest.partition("\t") if ended_run == run else ("", "", "")
        return cls(int(run), int(calls), float(since), process, where, kind, why)


class RollCall:
    """Notes of all ranks on how far they have come, in the store that the default process group was formed over.

    A note costs about 30 microseconds: the store need not answer it. Every rank makes the same calls in the same order,
    as with collectives.

    Args:
        name: of the method, the beginning of keys and messages.
        store: to note in, instead of the default group's; with ``rank`` and ``world``.
        rank: of this process; default: in the default group.
        world: number of ranks; default: of the default group.

    Example:
        roll_call = RollCall("dropcompute")
        with roll_call("optimizer step 3"):
            dist.all_reduce(tensor)
    """

    def __init__(self, name: str, *, store: Any = None, rank: int | None = None, world: int | None = None) -> None:
        self.name = name
        self.rank = dist.get_rank() if rank is None else rank
        self.world = dist.get_world_size() if world is None else world
        self.calls, self.run = 0, 1
        self.missing: list[int] = []
        self._process = this_process()
        self._store = None if self.world == 1 else _tcp_store() if store is None else store
        if self._store is not None:
            key = self._key(self.rank)
            if self._store.check([key]):  # notes of runs before do not count
                self.run += int(self._store.get(key).decode().partition("\t")[0])
            self._store.set(f"{key}/end", "")
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
            passes = isinstance(error, EffError | torch.OutOfMemoryError) or lost_a_loader_worker(error)
            if self.world == 1 or passes:
                raise
            raise self.lost(where, error) from error

    def note(self, where: str) -> None:
        """Note that this rank has come to ``where``, after ``calls`` calls: for one between two calls."""
        if self._store is not None:
            self._store.set(self._key(self.rank), self._line(where))

    def note_end(self) -> None:
        """Note that the run has ended well here; the rank that keeps the store may have left already."""
        self._set_if_kept(self._key(self.rank), self._line("the end of the run"))

    def _line(self, where: str) -> str:
        return f"{self.run}\t{self.calls}\t{time.time():.2f}\t{self._process}\t{where}"

    def note_error(self, error: BaseException) -> None:
        """Note that this error ends the run on this rank, for the others to read."""
        what = "lost a loader worker: " if lost_a_loader_worker(error) else "raised "
        self._note_end(_RAISED, f"{what}{type(error).__name__}: {_first_line(error)}"[:500])

    def lost(self, where: str, error: BaseException) -> RankLostError:
        """Return the error that says who is missing, and what became of them; :attr:`missing` are they.

        Args:
            where: this rank was.
            error: of the collective.
        """
        told = self._who_is_missing(where, timed_out=bool(_TIMED_OUT.search(str(error))))
        return RankLostError(
            f"{self.name}: the ranks did not come together at {where}, where rank {self.rank} was. {told} "
            f"(The collective said: {_first_line(error)})"
        )

    def wait_for_all(self, where: str, timeout_s: float) -> None:
        """Wait until every rank has noted its beginning, before there is a process group.

        Raises:
            RankLostError: one has not after ``timeout_s``, or has left again.
        """
        deadline, pause_s = time.monotonic() + timeout_s, 0.005
        while True:
            seen = self._read()
            if isinstance(seen, str):
                raise RankLostError(f"{self.name}: the ranks did not come together at {where}. {seen}")
            never = [rank for rank, one in enumerate(seen) if not one.run]
            left = [rank for rank, one in enumerate(seen) if one.run and (one.end or lives(one.process) is False)]
            if not never and not left:
                return
            if left or time.monotonic() > deadline:
                self._note_end(_WAITED, where)  # gloo, once it has tried in vain to connect, is of no use any more
                raise RankLostError(
                    f"{self.name}: the ranks did not come together at {where}, where rank {self.rank} was. "
                    f"{self._told(left or never, seen)} (timeout_s={timeout_s:g} limits the start as well: what a rank "
                    "does before it joins, its imports for instance, has to fit in.)"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.1)

    def stay(self) -> None:
        """Stay after an error, on the rank that keeps the store, until the others have read it, if they come soon."""
        if self._store is None or self.rank != 0 or _agent_keeps_the_store():
            return
        deadline = time.monotonic() + STAY_S
        while time.monotonic() < deadline:
            seen = self._read()
            if isinstance(seen, str):
                return
            others = [one for rank, one in enumerate(seen) if rank not in (self.rank, *self.missing)]
            if all(one.end or lives(one.process) is False for one in others):
                return
            time.sleep(_PAUSE_S)

    # ------------------------------------------------------------------------------------------ who is missing

    def _key(self, rank: int) -> str:
        return f"{self.name}/{rank}"

    def _note_end(self, kind: str, why: str) -> None:
        self._set_if_kept(f"{self._key(self.rank)}/end", f"{self.run}\t{kind}\t{why}")

    def _set_if_kept(self, key: str, note: str) -> None:
        if self._store is None:
            return
        with suppress(RuntimeError):  # with the store gone there is nobody to tell
            self._store.set(key, note)

    def _read(self) -> list[_Seen] | str:
        """Return what every rank has noted; or who keeps the store, and that it does not answer."""
        ranks = [self._key(rank) for rank in range(self.world)]
        notes = _read_soon(self._store, [*ranks, *(f"{key}/end" for key in ranks)])
        keeper = "torchrun's agent" if _agent_keeps_the_store() else "rank 0"
        kept = f"the store in which the ranks note how far they have come, which {keeper} keeps"
        if isinstance(notes, RuntimeError):
            return f"{_upper(keeper)} has ended or cannot be reached: {kept}, is gone ({_first_line(notes)})."
        if notes is None:
            return f"{_upper(keeper)} hangs or cannot be reached: {kept}, does not answer within {READ_S:g} s."
        return [_Seen.read(note, end) for note, end in zip(notes[: self.world], notes[self.world :], strict=True)]

    def _who_is_missing(self, where: str, *, timed_out: bool) -> str:
        """Return a few sentences on who did not come."""
        self._note_end(_WAITED, where)
        if self._store is None:
            return "Who was not is not known, because the process group was not formed over a TCPStore."
        deadline, own = time.monotonic() + GRACE_S, (self.run, self.calls)
        while True:
            seen = self._read()
            if isinstance(seen, str):
                self.missing = [] if _agent_keeps_the_store() else [0]
                return seen
            others = {rank: one for rank, one in enumerate(seen) if rank != self.rank}
            late = [rank for rank, one in others.items() if not one.end and (one.run, one.calls) < own]
            sure = [
                rank
                for rank, one in others.items()
                if one.end == _RAISED or (not one.end and lives(one.process) is False)
            ]
            if sure or (timed_out and late) or time.monotonic() > deadline:
                self.missing = sure or late or [rank for rank, one in others.items() if not one.end]
                return self._told(self.missing, seen) if self.missing else _all_waited(others)
            time.sleep(_PAUSE_S)

    def _told(self, missing: Sequence[int], seen: Sequence[_Seen]) -> str:
        told = [f"rank {rank} ({_last_seen(seen[rank])}){_fate(seen[rank])}" for rank in missing[:SHOWN]]
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        return f"Missing: {', '.join(told)}{more}. {_advice([seen[rank] for rank in missing])}"


def _last_seen(one: _Seen) -> str:
    return f"last seen at {one.where}" if one.where else "never seen"


def _fate(one: _Seen) -> str:
    """Return what became of a rank, as far as is known here."""
    if one.end == _RAISED:
        return f", which {one.why}"
    if one.end == _WAITED:
        return f", which had given up waiting at {one.why}"
    alive = lives(one.process) if one.process else None
    if alive is None:
        return ""
    return f", alive, and there for {max(time.time() - one.since, 0.0):.1f} s" if alive else ", whose process has ended"


def _advice(missing: Sequence[_Seen]) -> str:
    if any(one.end == _RAISED for one in missing):
        return "Its own output has the whole error."
    if any(one.process and lives(one.process) is False for one in missing):
        return "It was killed (out of memory?) or has left without an error: look at its output and the system's log."
    return (
        "It hangs or has ended: look for an error in its output. If it was only late, allow for it with a longer "
        "timeout_s."
    )


def _all_waited(others: dict[int, _Seen]) -> str:
    waited = [f"rank {rank} at {one.why}" for rank, one in list(others.items())[:SHOWN]]
    return (
        f"So was every other rank, and had given up waiting: {', '.join(waited)}. This rank came too late, or a "
        "connection was lost: look for the first error in the output of the others."
    )


def is_of_a_collective(error: BaseException) -> bool:
    """Return whether torch.distributed raised the error because other ranks, or the store, did not answer."""
    if not isinstance(error, RuntimeError) or isinstance(error, EffError) or _IN_USE.search(str(error)):
        return False
    return isinstance(error, dist.DistError) or bool(_OF_GLOO.search(str(error)))


def _agent_keeps_the_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _tcp_store() -> Any:
    """Return the default group's store, with its prefixes, if it is one that keeps a key only once."""
    store: Any = dist.distributed_c10d._get_default_store()
    under = store
    while isinstance(under, dist.PrefixStore):
        under = under.underlying_store
    return store if isinstance(under, dist.TCPStore) else None


def _read_soon(store: Any, keys: list[str]) -> list[str] | RuntimeError | None:
    """Return the values of ``keys`` ("" for none), the error of the store, or None if it does not answer in time.

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


def _first_line(error: BaseException) -> str:
    """Return what an error says, without gloo's advice to look at the other ranks, which has been followed."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return line.partition(" This is typically caused by")[0]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
