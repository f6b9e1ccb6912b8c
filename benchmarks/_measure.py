"""Interleaved timing: every round runs every candidate once, so that all share the machine's good and bad minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch

__all__ = ["Clock", "Step", "clock_for", "interleave", "threads"]

Step = Callable[[], object]
Clock = Literal["process_time", "wall", "cuda_event"]


def clock_for(device: str, num_threads: int) -> Clock:
    """Return the clock that tells the truth here.

    One thread: CPU time of the process, which a busy neighbour cannot lengthen. More threads: wall time, because CPU
    time adds up over threads. CUDA: events on the stream.
    """
    if device == "cuda":
        return "cuda_event"
    return "process_time" if num_threads == 1 else "wall"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch's CPU operations on ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time(step: Step, inner: int, clock: Clock) -> float:
    """Return the seconds of one call, averaged over ``inner`` calls in a row."""
    if clock == "cuda_event":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(inner):
            step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000 / inner
    now = time.process_time if clock == "process_time" else time.perf_counter
    begin_s = now()
    for _ in range(inner):
        step()
    return (now() - begin_s) / inner


def interleave(
    steps: Mapping[str, Step], *, rounds: int, inner: int | Mapping[str, int], clock: Clock, warmup: int = 2
) -> dict[str, list[float]]:
    """Return seconds per call and round for every candidate.

    Args:
        steps: name -> what to time.
        rounds: how often each candidate is timed. The order rotates, so that none always runs after the same one.
        inner: calls in a row per timing, one number or one per name.
        clock: see :func:`clock_for`.
        warmup: untimed calls of each candidate before the first round.
    """
    names = list(steps)
    calls = dict.fromkeys(names, inner) if isinstance(inner, int) else dict(inner)
    for name in names:
        for _ in range(warmup):
            steps[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(_time(steps[name], calls[name], clock))
    return times
