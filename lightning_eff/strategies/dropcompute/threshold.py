"""The compute threshold of a run: given, or chosen by all ranks from measured steps.

References:
    Giladi et al., DropCompute, NeurIPS 2023, arXiv:2306.10598, algorithm 2.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eff.errors import NoEffectWarning
from lightning_eff.functional.stragglers.model import best_threshold
from lightning_eff.functional.stragglers.timings import append_timings
from lightning_eff.strategies.dropcompute.options import UNSETTLED_STEPS

__all__ = ["MeasuredSteps", "SearchOptions", "ThresholdSearch"]


class SearchOptions(Protocol):
    """Has the options of the strategy that say how its threshold is found."""

    threshold: Literal["auto"] | float
    warmup_steps: int
    max_drop_rate: float
    min_micro_batches: int
    re_estimate_every_n_steps: int
    record_timings: str | None


@dataclass
class MeasuredSteps:
    """Holds the times of steps in which nothing was dropped, on this rank.

    Attributes:
        rows: of every step its micro-batches' seconds, then its wall time.
        micro_batches: M of these steps.
    """

    rows: list[list[float]] = field(default_factory=list)
    micro_batches: int = 0

    def gather(self) -> tuple[Tensor, Tensor]:
        """Return every rank's micro-batch times, (I, N, M), and the time outside the loop, (I,); begin anew."""
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, torch.tensor(self.rows, dtype=torch.float64, device="cpu"))
        self.rows = []
        everyone = torch.stack(parts, dim=1)
        table, walls = everyone[..., :-1], everyone[..., -1]
        # T^c_i: the wall time of step i, mean over the ranks, less the compute time of the slowest rank.
        return table, (walls.mean(1) - table.sum(-1).amax(1)).clamp(min=0)


@dataclass
class ThresholdSearch:
    """Measures steps without dropping, and lets all ranks agree on a threshold.

    Attributes:
        threshold_s: compute threshold tau, seconds; inf as long as none has been found.
        has_measured: whether it comes from a measurement that has ended.
        measuring_until: the optimizer step at which the measurement ends; 0 for none.
        unsettled_until: the last of the steps at the beginning whose times are not counted.
        measured: times of the steps so far.
    """

    threshold_s: float = math.inf
    has_measured: bool = False
    measuring_until: int = 0
    unsettled_until: int = 0
    measured: MeasuredSteps = field(default_factory=MeasuredSteps)

    def begin(self, steps: int, options: SearchOptions) -> None:
        """Begin a run after ``steps`` steps: of other layers, batches or machines nothing measured before is true."""
        is_automatic = options.threshold == "auto"
        self.threshold_s = math.inf if is_automatic else float(options.threshold)
        self.unsettled_until = steps + UNSETTLED_STEPS
        self.measuring_until = steps + options.warmup_steps if is_automatic else 0
        self.measured = MeasuredSteps()
        self.has_measured = False

    def tau(self, steps: int) -> float:
        """Return the threshold of the step after ``steps`` steps: none while measuring."""
        return math.inf if steps < self.measuring_until else self.threshold_s

    def resume(self, steps: int, options: SearchOptions, *, threshold_s: float, measured: bool | None) -> None:
        """Go on from a checkpoint after ``steps`` steps: with its threshold, or with the measurement that it cut short.

        Args:
            steps: optimizer steps made.
            options: of the strategy.
            threshold_s: saved threshold.
            measured: whether it was measured; older checkpoints do not say, and in them inf is taken for a measurement
                that had not ended.
        """
        self.unsettled_until = steps + UNSETTLED_STEPS
        if options.threshold != "auto":
            return
        self.has_measured = math.isfinite(threshold_s) if measured is None else measured
        self.threshold_s = threshold_s if self.has_measured else math.inf
        self.measuring_until = 0 if self.has_measured else steps + options.warmup_steps

    def end_step(
        self,
        steps: int,
        options: SearchOptions,
        *,
        times: Sequence[float],
        wall_s: float,
        micro_batches: int,
        is_whole: bool,
        broadcast: Callable[[float], float],
    ) -> None:
        """Take in the step that has just ended, and where a measurement ends agree on a threshold.

        Args:
            steps: optimizer steps made, this one counted.
            options: of the strategy.
            times: seconds of this rank's micro-batches.
            wall_s: wall time of the step.
            micro_batches: M of a full step.
            is_whole: whether the step was a full one, and no rank dropped anything.
            broadcast: gives every rank what rank 0 has.
        """
        if micro_batches != self.measured.micro_batches:
            self._measure_anew(steps, options, micro_batches)
        is_wanted = steps <= self.measuring_until or bool(options.record_timings)
        if is_whole and is_wanted and steps > self.unsettled_until:
            self.measured.rows.append([*times, wall_s])
        self._estimate(steps, options, broadcast)

    def _measure_anew(self, steps: int, options: SearchOptions, micro_batches: int) -> None:
        """Begin another measurement: ``accumulate_grad_batches`` has changed, what was measured is of another step."""
        if self.measured.micro_batches and options.threshold == "auto":
            self.measuring_until, self.has_measured = steps + options.warmup_steps, False
        self.measured = MeasuredSteps(micro_batches=micro_batches)

    def _estimate(self, steps: int, options: SearchOptions, broadcast: Callable[[float], float]) -> None:
        """Choose the threshold at the end of a measurement; where asked, begin another."""
        every = options.re_estimate_every_n_steps
        is_end = steps == self.measuring_until
        if is_end and self.measured.rows:
            table, other = self.measured.gather()
            _record(options, table, other, steps)
            # Algorithm 2: tau* with the most computed samples per second, of those that drop no more than allowed.
            tau = best_threshold(
                table, other, min_micro_batches=options.min_micro_batches, max_drop_rate=options.max_drop_rate
            )
            # Equal tables give equal thresholds; different processors might round differently.
            self.threshold_s, self.has_measured = float(broadcast(tau)), True
        elif is_end and math.isinf(self.threshold_s):
            warnings.warn(
                f"dropcompute has measured nothing and drops nothing: none of {options.warmup_steps} steps was a full "
                f"one of accumulate_grad_batches={self.measured.micro_batches} micro-batches. Use fewer, or "
                "threshold=seconds.",
                NoEffectWarning,
                stacklevel=2,
            )
        elif options.record_timings and len(self.measured.rows) == options.warmup_steps:
            _record(options, *self.measured.gather(), steps)
        elif every and options.threshold == "auto" and steps % every == 0:
            self.measuring_until = steps + max(options.warmup_steps // 5, 1)


def _record(options: SearchOptions, table: Tensor, other: Tensor, steps: int) -> None:
    """Append measured steps to the file of ``record_timings``, on rank 0."""
    if options.record_timings and dist.get_rank() == 0:
        append_timings(options.record_timings, table, other, first_step=steps - len(table))
