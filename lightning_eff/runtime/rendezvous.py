"""How the ranks of a run come together: in a store first, where the missing can be named, then in a process group."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lightning_eff.errors import RankLostError
from lightning_eff.runtime.roll_call import RollCall

__all__ = ["forget_collectives", "form_group", "is_ours"]

_FORMED = "lightning_eff/formed"
_PAUSE_S = 0.05
_LEFT: list[tuple[str, int, Any]] = []
"""Address and store of the last group this process was in: at most one. A group is a process's, not a strategy's."""


def form_group(
    name: str, environment: Any, *, rank: int, world: int, timeout: timedelta, form: Callable[[Any], None]
) -> None:
    """Form the default process group over a store of ours.

    A group that was left after an error may be formed again at the same address, under keys of its own.

    Args:
        name: of the method, for the error.
        environment: Lightning's cluster environment, which knows the address.
        rank: of this process.
        world: number of processes.
        timeout: until every rank has to be there.
        form: is given the store and forms the group.

    Raises:
        RankLostError: a rank did not come in time.
    """
    host, port = environment.main_address, environment.main_port
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeps = rank == 0 and not agent
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"lightning_eff/{attempt}/{rank}"
    tcp, number = _left_store(host, port, key)
    if tcp is None:
        if not keeps and not _answers(host, port, timeout.total_seconds()):
            keeper = "torchrun's agent" if agent else "rank 0"
            raise RankLostError(
                f"{name}: rank {rank} cannot start, because {keeper} is missing: nobody answers at {host}:{port} "
                f"within timeout_s={timeout.total_seconds():g}, which limits the start as well. Look for an error in "
                "its output."
            )
        kept = {"is_master": keeps, "multi_tenant": not agent}
        tcp = dist.TCPStore(host, port, timeout=timeout, wait_for_workers=False, **kept)
        _LEFT[:] = [(host, port, tcp)]
        number = tcp.add(key, 1)
    store = dist.PrefixStore(f"lightning_eff/{attempt}/{number}", tcp)
    roll_call = RollCall(name, store=store, rank=rank, world=world)
    roll_call.wait_for_all("the start", timeout.total_seconds())
    with roll_call("the start, forming the process group"):
        form(dist.PrefixStore("group", store))
    dist.distributed_c10d._get_default_store().set(f"{_FORMED}/{rank}", "")


def _left_store(host: str, port: int, key: str) -> tuple[Any, int]:
    """Return the store of the group before, if it is of this address and answers, and the new group's number.

    A new one in its place might be found by one rank and not by another, which is still connected to the old one.
    """
    for address, number, store in _LEFT:
        if (address, number) == (host, port):
            with contextlib.suppress(RuntimeError):
                return store, store.add(key, 1)
    _LEFT.clear()
    return None, 0


def _answers(host: str, port: int, within_s: float) -> bool:
    """Return whether somebody listens there; torch's own client tries for up to three times as long as it is told."""
    deadline = time.monotonic() + within_s
    while (left_s := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), timeout=left_s).close()
            return True
        time.sleep(min(_PAUSE_S, left_s))
    return False


def is_ours() -> bool:
    """Return whether the default process group was formed by :func:`form_group`."""
    return dist.is_initialized() and bool(
        dist.distributed_c10d._get_default_store().check([f"{_FORMED}/{dist.get_rank()}"])
    )


def forget_collectives(error: BaseException | None) -> None:
    """Let go of what frames of torch's and of this package's hold in an error's traceback.

    As long as anything there stands for a collective under way, gloo keeps the connections open, and other ranks do
    not learn that this one has given up.
    """
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_globals.get("__name__", "").startswith(("torch.distributed", "lightning_eff.")):
                try:
                    frame.clear()
                except RuntimeError:  # it still runs: a frame around the handler of the error
                    continue
        error = error.__cause__ or error.__context__
