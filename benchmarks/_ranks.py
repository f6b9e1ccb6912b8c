"""Real gloo ranks for benchmarks: a function runs on all of them, and what rank 0 makes of it comes back.

Every rank is a process of its own with one thread, as if started by torchrun. The store they meet over is kept here,
so that it outlives each of them.
"""

from __future__ import annotations

import datetime as dt
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.tasks.compare import quiet

__all__ = ["launch", "run_on_ranks"]

TIMEOUT_S = 120
"""Of a collective that a rank does not join."""
HOST = "127.0.0.1"


def launch(work: Callable[..., Iterator[Any]], world: int, *args: Any) -> Iterator[Any]:
    """Run the generator function ``work(*args)`` on ``world`` ranks and yield what it yields on rank 0.

    Args:
        work: of the top level of an importable module; what it yields must pickle.
        world: number of ranks.
        args: given to every rank.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; the others are ended.
    """
    receiving, sending = mp.get_context("spawn").Pipe(duplex=False)
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    ranks = mp.spawn(_rank, (work, world, store.port, sending, args), nprocs=world, join=False)
    try:
        ended = False
        while not ended:
            ended = ranks.join(timeout=0.2)
            while receiving.poll():
                yield pickle.loads(receiving.recv_bytes())
    finally:  # also of a caller that wants no more, or of ctrl-C
        for process in ranks.processes:
            process.kill()
            process.join()
        receiving.close()
        sending.close()


def run_on_ranks(work: Callable[..., Any], world: int, *args: Any) -> Any:
    """Run ``work(*args)`` on ``world`` ranks and return what it returns on rank 0; see :func:`launch`."""
    (result,) = launch(_once, world, work, *args)
    return result


def _once(work: Callable[..., Any], *args: Any) -> Iterator[Any]:
    yield work(*args)


def _rank(rank: int, work: Callable[..., Iterator[Any]], world: int, port: int, pipe: Any, args: Any) -> None:
    """Be one rank; rank 0 sends what ``work`` yields."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", TORCHELASTIC_RUN_ID="benchmark")
    os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR=HOST, MASTER_PORT=str(port))
    torch.set_num_threads(1)
    quiet()
    wait = dt.timedelta(seconds=TIMEOUT_S)
    store = dist.TCPStore(HOST, port, is_master=False, timeout=wait)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=wait)
    for item in work(*args):
        if rank == 0:
            pipe.send_bytes(pickle.dumps(item))  # by value: its tensors outlive this process
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort the interpreter now and then when it takes itself apart
