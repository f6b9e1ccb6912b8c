"""Where planned steps come from: a recorded run resampled to any number of workers, fitted, or simulated.

The file format of recorded runs is :mod:`lightning_eff.functional.stragglers.timings`; strategies write it.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Generator, Tensor

from lightning_eff.checks import Real, Whole, check
from lightning_eff.functional.stragglers.simulated import Delay
from lightning_eff.functional.stragglers.threshold import Timings
from lightning_eff.functional.stragglers.timings import read_timings, write_timings

__all__ = ["BootstrapSource", "DelaySource", "FittedSource", "Source", "read_timings", "write_timings"]


class Source(Protocol):
    """Draws the timings of steps that a cluster could take.

    Attributes:
        micro_batches: M, per worker and step.
        worker_steps: how many different worker-steps it can draw; inf if they are made, not chosen.
    """

    micro_batches: int
    worker_steps: float

    def draw(self, steps: int, workers: int, generator: Generator) -> Timings:
        """Return timings of ``steps`` steps of ``workers`` workers, a function of the generator's state."""
        ...

    def again(self, generator: Generator) -> Source:
        """Return the source that another recording of the cluster might have given; itself if it is no recording."""
        ...


class BootstrapSource:
    """Draws whole recorded worker-steps with replacement: what is correlated within a step stays so.

    Every simulated worker stands for one recorded rank, each for as many as another, so that a rank that is always slow
    stays one. Its steps are drawn independently of the other workers'. What never happened in the recording never
    happens here: beyond as many workers as there are recorded worker-steps, the slowest of them is in every step.

    Args:
        timings: of a run without dropping.
    """

    def __init__(self, timings: Timings) -> None:
        self.timings = timings
        self.micro_batches = timings.table.shape[-1]
        self.worker_steps = float(timings.table.shape[0] * timings.table.shape[1])

    def draw(self, steps: int, workers: int, generator: Generator) -> Timings:
        """Return recorded worker-steps chosen at random."""
        recorded, ranks, _ = self.timings.table.shape
        rank = torch.randperm(ranks, generator=generator, dtype=torch.int64, device="cpu")[
            torch.arange(workers, dtype=torch.int64, device="cpu") % ranks
        ]
        step = torch.randint(recorded, (steps, workers), generator=generator, dtype=torch.int64, device="cpu")
        return Timings(self.timings.table[step, rank], _choose(self.timings.other, steps, generator))

    def again(self, generator: Generator) -> BootstrapSource:
        """Return as many worker-steps of every rank, drawn from its own with replacement."""
        return BootstrapSource(_recorded_again(self.timings, generator))


class FittedSource:
    """Draws shifted lognormal times fitted to a recorded run; reaches further into the tail than the recording.

        t = c + exp(m + A + B),   A ~ N(0, a^2) of the worker-step,   B ~ N(0, b^2) of the micro-batch

    c makes the skewness of ln(t - c) zero; a and b are the variance components of one-way analysis. For one kind of
    machine and one kind of delay: ranks are alike, and two separate causes are not two separate peaks.

    Args:
        timings: of a run without dropping.
    """

    def __init__(self, timings: Timings) -> None:
        self.timings = timings
        self.micro_batches = timings.table.shape[-1]
        self.worker_steps = math.inf
        self.shift_s = _zero_skew_shift(timings.table.flatten())
        logs = (timings.table - self.shift_s).clamp(min=torch.finfo(torch.float64).tiny).log().flatten(0, 1)
        within = float(logs.var(-1).mean()) if self.micro_batches > 1 else 0.0
        between = float(logs.mean(-1).var()) if len(logs) > 1 else 0.0
        self.mean = float(logs.mean())
        self.step_std = math.sqrt(max(0.0, between - within / self.micro_batches))
        self.micro_batch_std = math.sqrt(within)

    def draw(self, steps: int, workers: int, generator: Generator) -> Timings:
        """Return times made with the fitted numbers."""
        shape = (steps, workers, self.micro_batches)
        logs = self.mean + self.micro_batch_std * torch.randn(
            shape, dtype=torch.float64, generator=generator, device="cpu"
        )
        logs += self.step_std * torch.randn((steps, workers, 1), dtype=torch.float64, generator=generator, device="cpu")
        return Timings(self.shift_s + logs.exp(), _choose(self.timings.other, steps, generator))

    def again(self, generator: Generator) -> FittedSource:
        """Return a fit to worker-steps drawn from the recorded ones with replacement."""
        return FittedSource(_recorded_again(self.timings, generator))


class DelaySource:
    """Draws the timings of a simulated cluster: equal micro-batches and a delay.

    Args:
        delay: from :func:`lightning_eff.functional.parse_delay`.
        micro_batches: M.
        base_s: undisturbed time of a micro-batch, seconds.
        other_s: time of a step outside the loop, seconds.

    Raises:
        ConfigurationError: a number is out of range.
    """

    def __init__(self, delay: Delay, micro_batches: int, *, base_s: float = 1.0, other_s: float = 0.0) -> None:
        self.delay = delay
        self.micro_batches: int = check("micro_batches", micro_batches, Whole(1))
        self.worker_steps = math.inf
        self.base_s: float = check("base_s", base_s, Real(0, above=True))
        self.other_s: float = check("other_s", other_s, Real(0))

    def draw(self, steps: int, workers: int, generator: Generator) -> Timings:
        """Return consecutive steps from a random one on."""
        first_step = int(torch.randint(2**31, (), generator=generator, dtype=torch.int64, device="cpu"))
        table = self.delay.table(steps, workers, self.micro_batches, base_s=self.base_s, first_step=first_step)
        return Timings(table, torch.full((steps,), self.other_s, dtype=torch.float64, device="cpu"))

    def again(self, generator: Generator) -> DelaySource:
        """Return the source itself: a simulated cluster is known exactly."""
        return self


def _recorded_again(timings: Timings, generator: Generator) -> Timings:
    steps, ranks, _ = timings.table.shape
    step = torch.randint(steps, (steps, ranks), generator=generator, dtype=torch.int64, device="cpu")
    return Timings(
        timings.table[step, torch.arange(ranks, dtype=torch.int64, device="cpu")],
        _choose(timings.other, steps, generator),
    )


def _choose(values: Tensor, number: int, generator: Generator) -> Tensor:
    return values[torch.randint(len(values), (number,), generator=generator, dtype=torch.int64, device="cpu")]


def _zero_skew_shift(times: Tensor) -> float:
    """Return the c in 0 .. min(t) at which ln(t - c) is not skewed, by bisection; 0 if not skewed to the right."""
    fastest = float(times.min())
    if _log_skew(times, 0.0) <= 0:
        return 0.0
    low, high = 0.0, fastest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _log_skew(times, middle) > 0 else (low, middle)
    return low


def _log_skew(times: Tensor, shift: float) -> float:
    """Return the third central moment of ln(t - shift); it falls without end near the fastest time."""
    logs = (times - shift).clamp(min=torch.finfo(torch.float64).tiny).log()
    return float((logs - logs.mean()).pow(3).mean())
