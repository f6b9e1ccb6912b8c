"""Real process groups for a battery: ``run_ranks(fn, 2, ...)`` runs ``fn(rank, world_size, ...)`` on two processes.

A Python with torch takes seconds to start, so the processes are started once and serve every later call; each call has
a rendezvous of its own, on another port. A process that has ended, or does not return, is replaced.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

__all__ = ["RanksFailedError", "close_ranks", "run_ranks"]

T = TypeVar("T")
_AFTERMATH_S = 5.0
"""How long the other ranks of a call have to say what they saw, once one has failed."""


class RanksFailedError(RuntimeError):
    """A rank raised, ended or did not return in time; the message has the traceback of each that raised."""


@dataclass(frozen=True)
class _Failure:
    text: str
    lost: bool = False


@dataclass(frozen=True)
class _Worker:
    process: Any
    pipe: Connection


_workers: list[_Worker] = []


def run_ranks(fn: Callable[..., T], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[T]:
    """Run ``fn(rank, world_size, *args)`` in ``world_size`` processes and return the results in the order of ranks.

    Every process sees the environment of a ``torchrun`` launch, so that ``Trainer(devices=world_size)`` inside ``fn``
    joins the others. Arguments and results are pickled; ``fn`` is a function at the top of a module.

    Args:
        fn: what to run.
        world_size: number of processes.
        args: what ``fn`` gets behind rank and world size.
        timeout_s: seconds after which processes that have not returned are ended.

    Raises:
        RanksFailedError: a rank raised, ended or took too long.
    """
    while len(_workers) < world_size:
        _workers.append(_started())
    port = _free_port()
    chosen = _workers[:world_size]
    for rank, worker in enumerate(chosen):
        launch = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                  "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_PORT": str(port),
                  "TORCHELASTIC_RUN_ID": "battery"}  # fmt: skip
        worker.pipe.send_bytes(pickle.dumps((fn, (rank, world_size, *args), launch)))
    answers = _collect(chosen, timeout_s)
    failed = {rank: answer for rank, answer in sorted(answers.items()) if isinstance(answer, _Failure)}
    for rank, failure in failed.items():
        if failure.lost:
            _end(chosen[rank])
    if failed:
        raise RanksFailedError("\n".join(f"--- rank {rank}\n{failure.text}" for rank, failure in failed.items()))
    return [answers[rank] for rank in range(world_size)]


def close_ranks() -> None:
    """End all processes; the next call starts others."""
    while _workers:
        _end(_workers[-1])


atexit.register(close_ranks)


def _end(worker: _Worker) -> None:
    _workers.remove(worker)
    worker.pipe.close()
    worker.process.kill()
    worker.process.join(5.0)


def _started() -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _collect(workers: list[_Worker], timeout_s: float) -> dict[int, Any]:
    """Return the answer of every rank; a rank without one has failed."""
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(answers) < len(workers) and (left := deadline - time.monotonic()) > 0:
        waited_for = {worker.pipe: rank for rank, worker in enumerate(workers) if rank not in answers}
        for pipe in wait(list(waited_for), timeout=left):
            rank = waited_for[pipe]  # type: ignore[index]
            try:
                answers[rank] = pickle.loads(workers[rank].pipe.recv_bytes())  # noqa: S301 - of our own process
            except (EOFError, OSError):
                answers[rank] = _Failure("its process has ended", lost=True)
            if isinstance(answers[rank], _Failure):
                deadline = min(deadline, time.monotonic() + _AFTERMATH_S)
    late = {rank: _Failure("it has not returned", lost=True) for rank in range(len(workers)) if rank not in answers}
    return {**answers, **late}


# ------------------------------------------------------------------------------------------------- in a process


def _serve(pipe: Connection) -> None:
    """Answer calls until the pipe is closed."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        pipe.send_bytes(_answer(message))


def _answer(message: bytes) -> bytes:
    try:
        fn, args, launch = pickle.loads(message)  # noqa: S301 - of the process that started this one
        return pickle.dumps(_call(fn, args, launch))
    except BaseException:  # noqa: BLE001 - told to the caller, who raises
        return pickle.dumps(_Failure(traceback.format_exc()))


def _call(fn: Callable[..., Any], args: tuple[Any, ...], launch: Mapping[str, str]) -> Any:
    dist: Any = importlib.import_module("torch.distributed")
    before = dict(os.environ)
    os.environ.update(launch)
    try:
        return fn(*args)
    finally:
        if dist.is_initialized():  # Lightning leaves its group to the end of the process
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)
