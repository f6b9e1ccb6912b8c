"""Random numbers that do not depend on where a stage runs: a stream for every (micro-batch, stage).

Within a pipelined training step all random numbers come from a seed that is hashed from the run's seed, the micro-batch
and the stage. Dropout then drops the same in one process and in several, the first and the last stage draw the same
where both run the user's code (mixup), and a resumed run goes on alike. Outside, the generators are as if the step had
drawn nothing: they stay equal on all ranks, and so do shuffles.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lightning_eff.functional.random import GOLDEN64, MASK64, mix64

USER = -1
"""The stream of the user's own code, before and after the stack."""


def _mix(z: int) -> int:
    """Return the number that splitmix64 draws after the state ``z``."""
    return mix64(z + GOLDEN64)


@dataclass
class Randomness:
    """Switches torch's generators between the streams of a run.

    Attributes:
        seed: of the run; 64 bits.
        device: where layers draw besides the CPU.
    """

    seed: int
    device: torch.device

    def _generators(self) -> list[torch.Generator]:
        on_device = [torch.cuda.default_generators[self.device.index or 0]] if self.device.type == "cuda" else []
        return [torch.default_generator, *on_device]

    def enter(self, micro_batch: int, stage: int) -> int:
        """Draw from the stream of this micro-batch in this stage from now on; return its seed."""
        seed = _mix(_mix(self.seed ^ _mix(micro_batch)) ^ _mix(stage & MASK64))
        for generator in self._generators():
            generator.manual_seed(seed >> 1)
        return seed

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Put torch's generators back, whatever is drawn inside."""
        generators = self._generators()
        before = [generator.get_state() for generator in generators]
        try:
            yield
        finally:
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)

    @contextlib.contextmanager
    def of(self, micro_batch: int, stage: int) -> Iterator[None]:
        """Draw from one stream; afterwards everything is as it was, for the user's code also ``random`` and numpy."""
        with self.kept():
            seed = self.enter(micro_batch, stage)
            with _python_and_numpy(seed) if stage == USER else contextlib.nullcontext():
                yield


@contextlib.contextmanager
def _python_and_numpy(seed: int) -> Iterator[None]:
    numpy: Any = sys.modules.get("numpy")
    python, other = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed & 0xFFFFFFFF)
        yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(other)


def broadcast_generators() -> None:
    """Give every rank the state of rank 0's generators: shuffles and augmentation have to be the same everywhere."""
    numpy: Any = sys.modules.get("numpy")
    states: list[Any] = [torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None]
    dist.broadcast_object_list(states, src=0)
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    if numpy and states[2] is not None:
        numpy.random.set_state(states[2])


def seed_of_run(steps: int = 0) -> int:
    """Hash the seed of a run from ``torch.initial_seed()``; no generator is drawn from.

    Args:
        steps: updates before the run; one that goes on after another draws other numbers.
    """
    return _mix((torch.initial_seed() & MASK64) ^ (_mix(steps) if steps else 0))
