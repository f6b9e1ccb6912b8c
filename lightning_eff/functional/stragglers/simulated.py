"""Simulated delays: the stragglers of a cluster on one machine, the same in every run.

A delay says how much longer a micro-batch takes than it would, as a multiple of what it takes undisturbed:

    lognormal   t <- t + mu min(Z / alpha, beta),  ln Z ~ N(4, 1), alpha = 2 e^4.5, beta = 5.5    (the paper's)
    stall       with probability p a whole worker-step is ``factor`` times slower
    slow        one rank is always ``factor`` times slower
    a file      what another run recorded (:mod:`.timings`), from the start again at its end

Every delay is a pure function of (seed, step, rank, micro-batch): runs are reproducible, resumed runs continue alike,
ranks need not draw in step, and micro-batches that were dropped change nothing for the rest.

References:
    Giladi et al., DropCompute, NeurIPS 2023, arXiv:2306.10598, appendix (simulated delay environment).
Differs: hashed instead of drawn. Delays are not cut off at the threshold, as those of the published code are: there the
    simulated delay can be stopped in the middle, a real one cannot.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_eff.checks import SEED, SHARE, Real, Rule, Text, Whole, check, shown
from lightning_eff.errors import ConfigurationError, nearest
from lightning_eff.functional.random import mix32
from lightning_eff.functional.stragglers.threshold import check_timings
from lightning_eff.functional.stragglers.timings import read_timings

MOST_DELAY = 1e6
"""Times slower. What takes longer is no straggler: a rank would sleep for days."""
_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


class Delay(ABC):
    """How much longer each micro-batch takes."""

    @abstractmethod
    def relative(self, step: Tensor, rank: Tensor, micro_batch: Tensor) -> Tensor:
        """Return the extra time in multiples of the undisturbed time.

        Args:
            step: optimizer step, int64, 0 or more; the three are broadcast together.
            rank: global rank of the worker.
            micro_batch: position in the step.

        Returns:
            float64, of their common shape or one that broadcasts to it.
        """

    def extra_s(self, step: int, rank: int, micro_batch: int, base_s: float) -> float:
        """Return the seconds to add to one micro-batch.

        Args:
            step: optimizer step, 0 or more.
            rank: global rank of the worker.
            micro_batch: position in the step.
            base_s: what the micro-batch takes undisturbed, seconds.
        """
        return base_s * float(
            self.relative(
                torch.tensor(step, dtype=torch.int64, device="cpu"),
                torch.tensor(rank, dtype=torch.int64, device="cpu"),
                torch.tensor(micro_batch, dtype=torch.int64, device="cpu"),
            )
        )

    def table(
        self, steps: int, workers: int, micro_batches: int, *, base_s: float = 1.0, first_step: int = 0
    ) -> Tensor:
        """Return the seconds of every micro-batch, with its delay; float64 (steps, workers, micro_batches)."""
        step = torch.arange(first_step, first_step + steps, dtype=torch.int64, device="cpu").view(-1, 1, 1)
        extra = self.relative(
            step,
            torch.arange(workers, dtype=torch.int64, device="cpu").view(-1, 1),
            torch.arange(micro_batches, dtype=torch.int64, device="cpu"),
        )
        return base_s * (1 + extra.expand(steps, workers, micro_batches))


def hashed_uniform(seed: int, *coordinates: Tensor) -> Tensor:
    """Return uniform float64 inside (0, 1), a function of the seed and of the integer coordinates alone.

    Args:
        seed: 64-bit integer.
        coordinates: int64, 0 or more, broadcast together.
    """
    h = torch.zeros((), dtype=torch.int32, device="cpu")
    for word in (
        torch.tensor(seed & _MASK, dtype=torch.int64, device="cpu"),
        torch.tensor(seed >> 32 & _MASK, dtype=torch.int64, device="cpu"),
        *coordinates,
    ):
        # One more than the word: mixing leaves 0 at 0, and (0, 0, 0) must be as random as the rest.
        h = mix32(h + ((word + 1) * _GOLDEN & _MASK).to(torch.int32))
    return ((h.to(torch.int64) & _MASK).double() + 0.5) / 2**32


@dataclass(frozen=True)
class LognormalDelay(Delay):
    """Every micro-batch takes min(Z / alpha, beta) longer, ln Z ~ N(4, 1): the simulated environment of the paper.

    On average 0.496 longer, standard deviation 0.605; 0.19 % of the micro-batches reach the cap.

    Attributes:
        alpha: scale; default 2 e^4.5, twice the mean of Z.
        beta: cap, in multiples of the undisturbed time.
        seed: 64-bit integer.
    """

    alpha: float = 2 * math.exp(4.5)
    beta: float = 5.5
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, "lognormal", alpha=Real(0, above=True), beta=Real(0, MOST_DELAY), seed=SEED)

    def relative(self, step: Tensor, rank: Tensor, micro_batch: Tensor) -> Tensor:
        """Turn one uniform number per micro-batch into one normal number (inverse transform)."""
        normal: Tensor = torch.special.ndtri(hashed_uniform(self.seed, step, rank, micro_batch))
        return ((4 + normal).exp() / self.alpha).clamp(max=self.beta)


@dataclass(frozen=True)
class StallDelay(Delay):
    """A whole worker-step is slower now and then: garbage collection, a busy neighbour, a hot chip.

    Attributes:
        p: probability that a worker stalls in a step, 0..1.
        factor: how many times longer its micro-batches take then, 1 or more.
        seed: 64-bit integer.
    """

    p: float = 0.1
    factor: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, "stall", p=SHARE, factor=Real(1, MOST_DELAY), seed=SEED)

    def relative(self, step: Tensor, rank: Tensor, micro_batch: Tensor) -> Tensor:
        """Draw one uniform number per worker-step, whichever micro-batch asks."""
        stalled = hashed_uniform(self.seed, step, rank) < self.p
        return stalled.double() * (self.factor - 1)


@dataclass(frozen=True)
class SlowRankDelay(Delay):
    """One rank is always slower: an older machine.

    Attributes:
        rank: which.
        factor: how many times longer its micro-batches take, 1 or more.
    """

    rank: int = 0
    factor: float = 2.0

    def __post_init__(self) -> None:
        _check(self, "slow", rank=Whole(), factor=Real(1, MOST_DELAY))

    def relative(self, step: Tensor, rank: Tensor, micro_batch: Tensor) -> Tensor:
        """Return a constant of the rank."""
        return (rank == self.rank).double() * (self.factor - 1)


@dataclass(frozen=True, eq=False)
class TraceDelay(Delay):
    """What another run recorded, relative to its fast micro-batches; wrapped around in every direction.

    A micro-batch is fast at the first percentile of the trace: a single one that was too short to be true (the last of
    an epoch, say) would make all others look slow. With ``base_s = fast_s`` the recorded times come back.

    Attributes:
        trace: seconds of every micro-batch of the recorded run, (steps, ranks, micro-batches).
        fast_s: what a fast micro-batch took, seconds.
    """

    trace: Tensor
    fast_s: float = field(init=False)

    def __post_init__(self) -> None:
        trace = check_timings(self.trace).table
        fast_s = float(trace.flatten().kthvalue(1 + trace.numel() // 100).values)
        if not fast_s > 0:
            raise ConfigurationError(
                "The fast micro-batches of the trace took 0 seconds; there is no slow beside that."
            )
        if float(trace.max()) > MOST_DELAY * fast_s:
            raise ConfigurationError(
                f"A micro-batch of the trace took {float(trace.max()):g} s, more than {MOST_DELAY:g} times the "
                f"{fast_s:g} s of its fast ones: that is a rank that hung, or a damaged file. Remove its row."
            )
        object.__setattr__(self, "trace", trace)
        object.__setattr__(self, "fast_s", fast_s)

    def relative(self, step: Tensor, rank: Tensor, micro_batch: Tensor) -> Tensor:
        """Look up; what was faster than ``fast_s`` is no delay."""
        steps, ranks, micro_batches = self.trace.shape
        seconds = self.trace[step % steps, rank % ranks, micro_batch % micro_batches]
        return (seconds / self.fast_s - 1).clamp(min=0)


_NAMED: dict[str, type[LognormalDelay] | type[StallDelay] | type[SlowRankDelay]] = {
    "lognormal": LognormalDelay,
    "stall": StallDelay,
    "slow": SlowRankDelay,
}
_KINDS: dict[str, Callable[[str], float]] = {"int": int, "float": float}


def parse_delay(spec: str, *, seed: int = 0) -> Delay:
    """Return the delay that a string describes.

    Args:
        spec: a name, ``"lognormal"``, ``"stall"`` or ``"slow"``, with options (the attributes of the classes above) as
            in ``"stall:p=0.2,factor=3"``; or the path of a recorded run, ``"run.csv"``.
        seed: of the random ones, unless ``spec`` has its own.

    Raises:
        ConfigurationError: the name, an option or a value is not allowed, or the file cannot be read.

    Example:
        >>> parse_delay("stall:p=0.2,factor=3")
        StallDelay(p=0.2, factor=3.0, seed=0)
        >>> parse_delay("lognormal", seed=7).extra_s(step=3, rank=1, micro_batch=0, base_s=0.03)
        0.0456...
    """
    name, _, options = check("delay", spec, Text("text: a kind of delay, or the path of a CSV file")).partition(":")
    kind = _NAMED.get(name.strip())
    if kind is None:
        if Path(name).suffix or os.path.isfile(spec):  # noqa: PTH113 - Path.is_file raises for what can be no path
            return TraceDelay(read_timings(spec).table)
        hint = nearest(name, _NAMED)
        raise ConfigurationError(
            f"No delay {shown(name)}.{hint} Known: {', '.join(_NAMED)}, or the path of a CSV file."
        )
    types = {item.name: str(item.type) for item in fields(kind)}
    given: dict[str, Any] = {"seed": seed} if "seed" in types else {}
    return kind(**given | dict(_option(name, text, types) for text in options.split(",") if text))


def _option(delay: str, text: str, types: dict[str, str]) -> tuple[str, float]:
    name, _, value = (part.strip() for part in text.partition("="))
    if name not in types:
        hint = nearest(name, types)
        raise ConfigurationError(f"Delay {delay!r} has no option {shown(name)}.{hint} Options: {', '.join(types)}.")
    try:
        return name, _KINDS[types[name]](value)
    except ValueError as error:
        raise ConfigurationError(
            f"Delay {delay!r}: {name}={shown(value)} is not a number of type {types[name]}; write {name}=VALUE."
        ) from error


def _check(delay: Delay, kind: str, **rules: Rule) -> None:
    for name, rule in rules.items():
        object.__setattr__(delay, name, check(f"Delay {kind!r}: {name}", getattr(delay, name), rule))
