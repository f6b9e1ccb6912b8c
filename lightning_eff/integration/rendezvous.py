"""How the ranks of a run come together: in a store first, where the missing can be named, then in a process group."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lightning_eff.errors import RankLostError
from lightning_eff.integration.roll_call import RollCall

__all__ = ["forget_collectives", "form_group", "is_ours"]

_FORMED = "lightning_eff/formed"


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
    try:
        tcp = dist.TCPStore(
            host, port, is_master=keeps, timeout=timeout, wait_for_workers=False, multi_tenant=not agent
        )
    except RuntimeError as error:
        if keeps:  # the address is not to be had; the error says so
            raise
        keeper = "torchrun's agent" if agent else "rank 0"
        raise RankLostError(
            f"{name}: rank {rank} cannot start, because {keeper} is missing: nobody answers at {host}:{port} within "
            f"timeout_s={timeout.total_seconds():g}, which limits the start as well. Look for an error in its output."
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    number = tcp.add(f"lightning_eff/{attempt}/{rank}", 1)
    store = dist.PrefixStore(f"lightning_eff/{attempt}/{number}", tcp)
    roll_call = RollCall(name, store=store, rank=rank, world=world)
    roll_call.wait_for_all("the start", timeout.total_seconds())
    with roll_call("the start, forming the process group"):
        form(dist.PrefixStore("group", store))
    dist.distributed_c10d._get_default_store().set(f"{_FORMED}/{rank}", "")


def is_ours() -> bool:
    """Whether the default process group was formed by :func:`form_group`."""
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
