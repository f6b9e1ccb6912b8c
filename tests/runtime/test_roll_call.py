"""A roll call names the ranks that did not come to a collective, whatever has become of them and of the store."""

from __future__ import annotations

import datetime as dt
import os
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_eff.errors import ConfigurationError, EffError, RankLostError
from lightning_eff.runtime import roll_call as module
from lightning_eff.runtime.processes import this_process
from lightning_eff.runtime.rendezvous import forget_collectives
from lightning_eff.runtime.roll_call import RollCall
from tests.harness import run_ranks
from tests.integration.conftest import ROOT

WAIT_S = 1.0
"""Timeout of the group's collectives."""


def _group(wait_s: float = WAIT_S) -> None:
    """Over a TCPStore, as Lightning and torchrun form theirs."""
    dist.init_process_group("gloo", timeout=dt.timedelta(seconds=60))
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(dt.timedelta(seconds=wait_s))


def _meet(roll_call: RollCall, step: int) -> str:
    """Return what the error says, or nothing."""
    try:
        with roll_call(f"step {step}"):
            dist.all_reduce(torch.ones(3))
    except RankLostError as error:
        return str(error) if isinstance(error.__cause__, RuntimeError) else "without its cause"
    return ""


def _absent(rank: int, world: int, folder: str, absent: list[int]) -> str:
    """Three steps; those that are absent do not come to the last."""
    _group()
    roll_call = RollCall("test")
    dist.barrier()
    assert [_meet(roll_call, step) for step in range(3)] == [""] * 3
    mark = Path(folder) / f"told-{rank}"
    if rank in absent:
        while len(list(Path(folder).iterdir())) < world - len(absent):
            time.sleep(0.02)
        return ""
    told = _meet(roll_call, 3)
    mark.touch()
    while len(list(Path(folder).iterdir())) < world - len(absent):  # rank 0 keeps the store
        time.sleep(0.02)
    return told


@pytest.mark.parametrize("absent", [[1], [0], [0, 2]], ids=str)
def test_everybody_names_those_who_are_missing(tmp_path: Path, absent: list[int]) -> None:
    told = run_ranks(_absent, 3, str(tmp_path), absent, init_group=False, timeout_s=20.0)
    for rank in set(range(3)) - set(absent):
        assert told[rank].startswith(f"test: the ranks did not come together at step 3, where rank {rank} was. ")
        named = re.sub(r", alive, and there for \d+\.\d s", "", told[rank])
        assert named != told[rank], "it is late, and no more is said of it"
        seen = ", ".join(f"rank {rank} (last seen at step 2)" for rank in absent)
        assert f"Missing: {seen}. It hangs or has ended" in named
        assert "The collective said: " in told[rank]


def _again(rank: int, world: int, folder: str) -> str:
    """A second roll call of the same name in the same group: the notes of the first do not count."""
    _group()
    roll_call = RollCall("test")
    for step in range(5):
        _meet(roll_call, step)
    roll_call = RollCall("test")
    dist.barrier()
    if rank == 1:
        while not (Path(folder) / "told").exists():
            time.sleep(0.02)
        return ""
    told = _meet(roll_call, 0)
    (Path(folder) / "told").touch()
    return told


def test_notes_of_an_earlier_roll_call_do_not_count(tmp_path: Path) -> None:
    told, _ = run_ranks(_again, 2, str(tmp_path), init_group=False, timeout_s=20.0)
    assert "Missing: rank 1 (last seen at the beginning)" in told


def _late(rank: int, world: int, folder: str) -> str:
    """Rank 1 comes when rank 0 has given up waiting."""
    _group()
    roll_call = RollCall("test")
    dist.barrier()
    if rank == 1:
        while not (Path(folder) / "told").exists():
            time.sleep(0.02)
        told = _meet(roll_call, 0)
        (Path(folder) / "late").touch()
        return told
    told = _meet(roll_call, 0)
    (Path(folder) / "told").touch()
    while not (Path(folder) / "late").exists():
        time.sleep(0.02)
    return told


def test_who_comes_too_late_is_told_that_the_others_have_left(tmp_path: Path) -> None:
    first, second = run_ranks(_late, 2, str(tmp_path), init_group=False, timeout_s=20.0)
    assert "Missing: rank 1" in first
    assert "So was every other rank, and had given up waiting: rank 0 at step 0." in second


def _what_the_store_keeps(rank: int, world: int) -> dict[str, Any]:
    _group(60.0)
    roll_call = RollCall("test")
    dist.barrier()
    store = dist.distributed_c10d._get_default_store()
    before, times = store.num_keys(), []
    for step in range(200):
        began = time.perf_counter()
        with roll_call(f"step {step}"):
            pass
        times.append(time.perf_counter() - began)
    dist.barrier()
    found = {"keys": store.num_keys() - before, "seconds": sorted(times)[100], "note": store.get(f"test/{1 - rank}")}
    dist.barrier()  # rank 0 keeps the store
    return found


def test_a_note_costs_next_to_nothing_and_the_store_does_not_grow() -> None:
    for found in run_ranks(_what_the_store_keeps, 2, init_group=False):
        assert found["keys"] == 0
        assert found["seconds"] < 0.3e-3
        assert found["note"].split(b"\t")[:2] == [b"1", b"200"]
        assert found["note"].endswith(b"\tstep 199")


def _fails(rank: int, world: int, error: type[Exception]) -> tuple[str, str]:
    try:
        with RollCall("test")("step 0"):
            raise error("on purpose")
    except (EffError, error) as caught:
        return type(caught).__name__, str(caught)


def test_other_errors_pass_and_a_store_that_keeps_every_note_is_left_alone() -> None:
    """The harness forms its groups over a file, which grows with every write."""
    for kind, told in run_ranks(_fails, 2, ValueError):
        assert (kind, told) == ("ValueError", "on purpose")
    for kind, told in run_ranks(_fails, 2, RuntimeError):
        assert kind == "RankLostError"
        assert "not known, because the process group was not formed over a TCPStore" in told
    assert run_ranks(_fails, 1, RuntimeError) == [("RuntimeError", "on purpose")]


class Store:
    """Answers like a TCPStore: as it is told to."""

    def __init__(self, error: Exception | None = None, wait_s: float = 0.0, notes: dict[str, bytes] | None = None):
        self.error, self.wait_s, self.notes = error, wait_s, notes or {}

    def check(self, keys: list[str]) -> bool:
        time.sleep(self.wait_s)
        if self.error:
            raise self.error
        return all(key in self.notes for key in keys)

    def set(self, key: str, note: str) -> None:
        if self.error:
            raise self.error
        self.notes[key] = note.encode()

    def get(self, key: str) -> bytes:
        return self.notes[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.notes[key] for key in keys]


def _missing(store: Any, world: int = 2) -> str:
    """What rank 1 is told, which came to step 3 and whose time ran out."""
    roll_call = RollCall("test", store=Store(), rank=1, world=world)
    roll_call.calls, roll_call._store = 3, store
    return str(roll_call.lost("step 3", RuntimeError("Timed out"))).partition(" was. ")[2]


def _note(calls: int, where: str, *, run: int = 1, process: str = "") -> bytes:
    return f"{run}\t{calls}\t{time.time() - 2}\t{process}\t{where}".encode()


def test_a_store_that_is_gone_or_silent_tells_who_kept_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_S", 0.1)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert _missing(Store(RuntimeError("reset\nby peer"))).startswith("Rank 0 has ended or cannot be reached")
    assert "(reset)" in _missing(Store(RuntimeError("reset\nby peer")))
    assert _missing(Store(wait_s=0.3)).startswith("Rank 0 hangs or cannot be reached")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert _missing(Store(RuntimeError(""))).startswith("Torchrun's agent has ended")
    time.sleep(0.3)  # the thread that waited


def test_ranks_that_never_came_and_many_at_once() -> None:
    assert "Missing: rank 0 (never seen). " in _missing(Store(notes={"test/1": _note(3, "step 3")}))
    notes = {f"test/{rank}": _note(3, "step 2") if rank % 2 else _note(2, "step 1") for rank in range(40)}
    told = _missing(Store(notes=notes), 40)
    assert "rank 14 (last seen at step 1) and 12 more." in told
    assert "rank 16" not in told


# ---------------------------------------------------------------------------------------------------- what became of it


@pytest.mark.parametrize(
    ("process", "end", "told"),
    [
        ("", b"", "Missing: rank 0 (last seen at step 2). It hangs or has ended"),
        ("of another machine 1 1", b"", "Missing: rank 0 (last seen at step 2). It hangs or has ended"),
        (this_process(), b"", "Missing: rank 0 (last seen at step 2), alive, and there for 2."),
        ("gone", b"", "Missing: rank 0 (last seen at step 2), whose process has ended. It was killed"),
        (
            "gone",
            b"1\traised\traised E: no",
            "Missing: rank 0 (last seen at step 2), which raised E: no. Its own output",
        ),
        ("gone", b"1\twaited\tstep 2", "So was every other rank, and had given up waiting: rank 0 at step 2."),
        (this_process(), b"7\traised\tof another run", "Missing: rank 0 (last seen at step 2), alive"),
    ],
    ids=["no process", "of another machine", "alive", "gone", "raised", "waited", "alive in another run"],
)
def test_what_became_of_the_missing_rank_is_told(process: str, end: bytes, told: str) -> None:
    if process == "gone":
        place, numbers, *_ = this_process().split(" ")
        process = f"{place} {numbers} {os.getpid()} 1"  # that number, of a process that began at another time
    notes = {"test/0": _note(2, "step 2", process=process), "test/0/end": end, "test/1": _note(3, "step 3")}
    assert _missing(Store(notes={**notes, "test/1/end": b""})).startswith(told)


def test_a_rank_that_is_in_an_earlier_run_is_missing_however_far_it_came_there() -> None:
    notes = {"test/0": _note(99, "the end of the run"), "test/1": _note(3, "step 3", run=2)}
    roll_call = RollCall("test", store=Store(notes=notes), rank=1, world=2)
    assert roll_call.run == 3
    told = "Missing: rank 0 .last seen at the end of the run."
    with pytest.raises(RankLostError, match=told) as caught, roll_call("step 0"):
        raise RuntimeError("Timed out")
    assert roll_call.missing == [0]
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_errors_that_are_nobody_elses_pass() -> None:
    """A dead loader worker is told of by a signal, whatever the rank is doing, and so while it waits for others."""
    worker = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    for error in (torch.OutOfMemoryError("full"), ConfigurationError("no"), worker):
        roll_call = RollCall("test", store=Store(), rank=1, world=2)
        with pytest.raises(type(error)) as caught, roll_call("step 0"):
            raise error
        assert caught.value is error
    roll_call.note_error(worker)
    assert "lost a loader worker: RuntimeError: DataLoader worker" in roll_call._store.get("test/1/end").decode()


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("Gloo connectFullMesh failed"), True),
        (dist.DistNetworkError("Connection reset by peer"), True),
        (dist.DistNetworkError("EADDRINUSE, message: address already in use"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
        (RankLostError("gloo"), False),
    ],
)
def test_what_comes_from_a_collective_is_told_from_other_errors(error: Exception, is_one: bool) -> None:
    assert module.is_of_a_collective(error) == is_one


class Work:
    """Of a collective under way."""


COLLECTIVE = """
def all_reduce(work):
    handle = work()
    seen(handle)
    raise RuntimeError("Connection closed by peer")
"""


@pytest.mark.parametrize(("module_name", "held"), [("torch.distributed.c10d", False), ("of_the_user", True)])
def test_an_error_holds_no_collective_and_the_users_frames_stay_for_debuggers(module_name: str, held: bool) -> None:
    """What a traceback holds keeps connections open, and the other ranks waiting."""
    seen: list[weakref.ref[Work]] = []
    names: dict[str, Any] = {"__name__": module_name, "seen": lambda handle: seen.append(weakref.ref(handle))}
    exec(COLLECTIVE, names)

    def fail() -> None:
        try:
            names["all_reduce"](Work)
        except RuntimeError as error:
            raise ValueError("the same") from error

    with pytest.raises(ValueError, match="the same") as caught:
        fail()
    assert seen[0]() is not None
    forget_collectives(caught.value)
    assert (seen[0]() is not None) == held


def test_a_loader_worker_ends_with_its_rank(tmp_path: Path) -> None:
    """Though it was forked, and is busy."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    rank = subprocess.Popen([sys.executable, str(script)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    with rank, rank.stdout:
        worker = int(rank.stdout.readline())
        rank.kill()
    deadline = time.monotonic() + 5.0
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


RANK = """
import os, time
from lightning_eff.runtime.processes import EndWithParent
import multiprocessing
def work():
    EndWithParent(print)(os.getpid())
    import sys; sys.stdout.flush()
    time.sleep(60)
worker = multiprocessing.get_context("fork").Process(target=work)
worker.start()
worker.join()
"""
