"""The process behind one rank: waits for calls, forms a group, runs the function, answers, cleans up."""

from __future__ import annotations

import contextlib
import datetime as dt
import faulthandler
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any


@dataclass
class Call:
    """One function call on one rank."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rank: int
    world_size: int
    store: str
    timeout_s: float
    init_group: bool
    port: int
    env: dict[str, str]


@dataclass
class Failure:
    """What a rank that raised sends back."""

    kind: str
    text: str


def worker_main(pipe: Connection, stacks: str) -> None:
    """Serve calls until the pipe closes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's business
    _end_with_parent()
    with Path(stacks).open("w") as file:
        _dump_on_request(file)
        import torch

        torch.set_num_threads(1)
        pipe.send_bytes(b"ready")
        while True:
            try:
                message = pipe.recv_bytes()
            except (EOFError, OSError):
                return
            _dump_on_request(file)
            pipe.send_bytes(_answer(message))


def _dump_on_request(file: IO[str]) -> None:
    """Write all stacks on SIGUSR1, anew for every call: a Trainer sets back the handlers that Python knows."""
    if hasattr(signal, "SIGUSR1"):
        faulthandler.unregister(signal.SIGUSR1)
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)


def _end_with_parent() -> None:
    """Leave at once when the parent dies, also out of a collective that waits for a peer."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _answer(message: bytes) -> bytes:
    from tests.harness.leaks import Snapshot

    before = Snapshot()
    try:
        result = pickle.dumps(_run(pickle.loads(message)))
    except BaseException as error:  # noqa: BLE001 - reported to the parent, which raises
        before.leaks()
        return pickle.dumps(Failure(type(error).__name__, traceback.format_exc()))
    if leaks := before.leaks():
        return pickle.dumps(Failure("Leak", "\n".join(leaks)))
    return result


def _run(call: Call) -> Any:
    import torch.distributed as dist

    from tests.harness.seeds import FIXED_SEED, seed_everything

    seed_everything(FIXED_SEED)
    with _launch_environment(call):
        if call.init_group:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{call.store}",
                rank=call.rank,
                world_size=call.world_size,
                timeout=dt.timedelta(seconds=call.timeout_s),
            )
            dist.barrier()  # a rank that is done at once must not leave while another is still connecting
        try:
            return call.fn(call.rank, call.world_size, *call.args, **call.kwargs)
        finally:
            if dist.is_initialized():  # Lightning leaves the group it formed to the end of the process
                dist.destroy_process_group()


@contextlib.contextmanager
def _launch_environment(call: Call) -> Iterator[None]:
    """The variables ``torchrun`` sets, for the length of one call."""
    rank, size = str(call.rank), str(call.world_size)
    launch = {
        "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(call.port), "TORCHELASTIC_RUN_ID": "tests", **call.env,
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in launch}
    os.environ.update(launch)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
