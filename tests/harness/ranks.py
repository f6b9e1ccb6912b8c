"""Real process groups for tests: ``run_ranks(fn, world_size)`` runs ``fn(rank, world_size, ...)`` on gloo ranks.

Starting a Python with torch takes seconds, forming a fresh group takes milliseconds. So the worker processes are
started once, on first use, and serve the whole test run; every call gets a new group over a new file store. A worker
that dies or hangs is killed with its peers and replaced on the next call.

One worker is started anew; the others are forked, each by itself, from a process that has imported what they need. The
seed of Python's hashes is thus another one on one of the ranks, and what follows the order of a set tells.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from tests.harness.worker import Call, Failure, worker_main

T = TypeVar("T")
START_S = 60.0  # a worker has to import torch
PRELOADED = [
    "torch.distributed",
    "lightning.pytorch",
    "pytorch_lightning",
    "lightning_eff.strategies",
    "lightning_eff.precision",
    "lightning_eff.callbacks",
    "tests.harness.worker",
    "tests.harness.leaks",
]
AFTERMATH_S = 3.0  # what the peers of a failed rank get to report on their own


class RanksFailedError(RuntimeError):
    """One or more ranks raised, died or hung; the message holds every rank's story.

    Attributes:
        failures: rank -> exception type name, ``"died"`` or ``"hung"``.
    """

    def __init__(self, stories: dict[int, tuple[str, str]]) -> None:
        self.failures = {rank: kind for rank, (kind, _) in stories.items()}
        told = (f"--- rank {rank}: {kind}\n{text}" for rank, (kind, text) in sorted(stories.items()))
        super().__init__("\n".join(told))


class _Worker:
    """One process, its pipe and the file its stacks are dumped to."""

    def __init__(self, folder: Path, number: int, *, forked: bool) -> None:
        context = multiprocessing.get_context("forkserver" if forked else "spawn")
        if forked:
            context.set_forkserver_preload(PRELOADED)
        self.forked = forked
        self.stacks = folder / f"stacks-{number}.txt"
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=worker_main, args=(theirs, str(self.stacks)), name=f"rank-{number}")
        self.process.daemon = False  # a rank may start loader workers of its own; it ends with its parent regardless
        self.process.start()
        theirs.close()

    def dump_stacks(self) -> str:
        """Ask a living worker for the stack of every thread."""
        if not hasattr(signal, "SIGUSR1") or not self.process.is_alive():
            return ""
        with contextlib.suppress(OSError):
            os.kill(self.process.pid or 0, signal.SIGUSR1)
            time.sleep(0.3)
            return self.stacks.read_text()
        return ""

    def kill(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join(5.0)


class _Pool:
    """Workers that outlive the calls; grows to the largest world size asked for."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []
        self.folder = Path(tempfile.mkdtemp(prefix="eff-ranks-"))
        self.calls = self.started = 0

    def ready(self, count: int) -> list[_Worker]:
        self.workers = [worker for worker in self.workers if worker.process.is_alive()]
        new = []
        while len(self.workers) < count:
            forked = any(not worker.forked for worker in self.workers)
            new.append(_Worker(self.folder, self.started, forked=forked))
            self.workers.append(new[-1])
            self.started += 1
        for worker in new:
            if not worker.pipe.poll(START_S):
                self.close()
                raise RuntimeError(f"a rank's process did not start within {START_S:.0f} s")
            worker.pipe.recv_bytes()  # its greeting
        return self.workers[:count]

    def discard(self, workers: list[_Worker]) -> None:
        for worker in workers:
            worker.kill()
            self.workers.remove(worker)

    def close(self) -> None:
        self.discard(list(self.workers))
        shutil.rmtree(self.folder, ignore_errors=True)


_pool: _Pool | None = None


def worker_pids() -> set[int]:
    """Process ids of the pool, which the leak police leaves alone."""
    return {worker.process.pid or 0 for worker in _pool.workers} if _pool else set()


def close_pool() -> None:
    """End every worker; the next call starts new ones."""
    global _pool
    if _pool is not None:
        _pool.close()
        _pool = None


atexit.register(close_pool)


def run_ranks(
    fn: Callable[..., T],
    world_size: int = 2,
    *args: Any,
    timeout_s: float = 60.0,
    init_group: bool = True,
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> list[T]:
    """Run ``fn(rank, world_size, *args, **kwargs)`` in ``world_size`` processes and return their results in order.

    Each process sees the environment of a ``torchrun`` launch, so that ``Trainer(devices=world_size)`` inside ``fn``
    joins the group instead of starting processes.

    Args:
        fn: a function at the top of an importable module; arguments and results must pickle.
        world_size: number of processes.
        args: positional arguments after rank and world size.
        timeout_s: after this time the ranks are killed; the stacks of those that hung are in the error.
        init_group: form a gloo group first. False for code under test that forms its own.
        env: extra environment variables for the call.
        kwargs: keyword arguments of ``fn``.

    Raises:
        RanksFailedError: a rank raised, died or hung, or leaked what the leak police watches.
    """
    global _pool
    _pool = _pool or _Pool()
    workers = _pool.ready(world_size)
    _pool.calls += 1
    store, port = _pool.folder / f"store-{_pool.calls}", free_port()
    for rank, worker in enumerate(workers):
        call = Call(fn, args, kwargs, rank, world_size, str(store), timeout_s, init_group, port, env or {})
        worker.pipe.send_bytes(pickle.dumps(call))
    results, stories = _collect(workers, timeout_s)
    _pool.discard([worker for rank, worker in enumerate(workers) if stories.get(rank, ("",))[0] in ("died", "hung")])
    store.unlink(missing_ok=True)
    if stories:
        raise RanksFailedError(stories)
    return [results[rank] for rank in range(world_size)]


def free_port() -> int:
    """Return a port for code under test that forms its own group through MASTER_PORT.

    It is below those the system gives to outgoing connections, of which one could take it before rank 0 does, and each
    test process begins at another place.
    """
    for port in _ports:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


def _places() -> Iterator[int]:
    """Every port from 10000 to 31999, round and round, from a place of this process."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    start = os.getpid() + 7919 * number
    return (10_000 + (start + turn) % 22_000 for turn in range(10**6))


_ports = _places()


def _collect(workers: list[_Worker], timeout_s: float) -> tuple[dict[int, Any], dict[int, tuple[str, str]]]:
    """Wait for every rank; after a first failure the others get a short aftermath, then count as hung."""
    results: dict[int, Any] = {}
    stories: dict[int, tuple[str, str]] = {}
    pending: dict[Connection, int] = {worker.pipe: rank for rank, worker in enumerate(workers)}
    deadline = time.monotonic() + timeout_s
    while pending and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(pending), timeout=left):
            rank = pending.pop(pipe)  # type: ignore[call-overload]
            try:
                answer = pickle.loads(workers[rank].pipe.recv_bytes())
            except (EOFError, OSError):
                workers[rank].process.join(5.0)
                stories[rank] = ("died", f"exit code {workers[rank].process.exitcode}")
            else:
                if isinstance(answer, Failure):
                    stories[rank] = (answer.kind, answer.text)
                else:
                    results[rank] = answer
            if stories:
                deadline = min(deadline, time.monotonic() + AFTERMATH_S)
    for rank in pending.values():
        stories[rank] = ("hung", workers[rank].dump_stacks())
    return results, stories
