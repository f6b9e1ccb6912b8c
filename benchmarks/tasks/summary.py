"""Turn the runs of a comparison into a table, a figure and one sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.tasks.compare import Run

__all__ = ["Outcome", "figure", "outcome_table", "verdict"]

BASE = "fp32"
LOG_RANGE = 30
SHOWN = 0.01  # metrics are printed with two decimals


@dataclass(frozen=True)
class Outcome:
    """Everything measured on one task.

    Attributes:
        title: what the task is.
        quality: name and unit of the validation metric.
        factor: multiplies the logged metric into that unit.
        higher_is_better: direction of the metric.
        loss_label: name and unit of the training loss on the figure.
        loss_factor: multiplies the logged loss into that unit.
        runs: variant -> one run per seed.
        step_s: variant -> median seconds per step of each interleaved round.
    """

    title: str
    quality: str
    factor: float
    higher_is_better: bool
    loss_label: str
    loss_factor: float
    runs: Mapping[str, Sequence[Run]]
    step_s: Mapping[str, Sequence[float]]

    def metrics(self, variant: str) -> list[float]:
        """Return the final validation metric of every seed."""
        return [run.metric * self.factor for run in self.runs[variant]]

    def gap(self, variant: str) -> float:
        """Return how much worse than fp32 the mean metric is; negative when it is better."""
        difference = statistics.mean(self.metrics(variant)) - statistics.mean(self.metrics(BASE))
        return -difference if self.higher_is_better else difference

    def time_ratio(self, variant: str) -> tuple[float, float, float]:
        """Return median, smallest and largest per-round step time as a multiple of fp32."""
        ratios = [a / b for a, b in zip(self.step_s[variant], self.step_s[BASE], strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)

    def memory_ratios(self, variant: str) -> tuple[float, float]:
        """Return the bytes kept for backward by the quantisable layers, and by the model, as multiples of fp32."""
        ours, base = self.runs[variant][0], self.runs[BASE][0]
        return ours.layer_bytes / max(base.layer_bytes, 1), ours.model_bytes / max(base.model_bytes, 1)


def outcome_table(outcome: Outcome) -> Table:
    """Return one column per variant, 80 characters wide."""
    steps = len(outcome.runs[BASE][0].losses)
    table = Table(title=f"{outcome.title}, {steps} steps", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for variant in outcome.runs:
        table.add_column(variant, justify="right", no_wrap=True)
    for label, cell in _cells(outcome).items():
        table.add_row(label, *(cell(variant) for variant in outcome.runs))
    return table


def _cells(outcome: Outcome) -> dict[str, Callable[[str], str]]:
    """Return row label -> what stands in the column of a variant."""

    def only_ours(text: Callable[[str], str]) -> Callable[[str], str]:
        return lambda variant: "" if variant == BASE else text(variant)

    def seeds(variant: str) -> str:
        values = outcome.metrics(variant)
        return f"{min(values):.1f}..{max(values):.1f}" if len(values) > 1 else "1 seed"

    def low_high(variant: str) -> str:
        _, low, high = outcome.time_ratio(variant)
        return f"{low:.2f}..{high:.2f}"

    return {
        outcome.quality: lambda variant: f"{statistics.mean(outcome.metrics(variant)):.2f}",
        "  min..max over seeds": seeds,
        "  worse than fp32 by": only_ours(lambda variant: f"{outcome.gap(variant):+.2f}"),
        "ms per step": lambda variant: f"{1000 * statistics.median(outcome.step_s[variant]):.1f}",
        "  as a multiple of fp32": only_ours(lambda variant: f"{outcome.time_ratio(variant)[0]:.2f}"),
        "  min..max over rounds": only_ours(low_high),
        "kept for backward / fp32": only_ours(lambda _: ""),
        "  in the 4-bit layers": only_ours(lambda variant: f"{outcome.memory_ratios(variant)[0]:.2f}"),
        "  whole model": only_ours(lambda variant: f"{outcome.memory_ratios(variant)[1]:.2f}"),
    }


def verdict(outcome: Outcome, variant: str = "luq4") -> str:
    """Return one sentence on what ``variant`` costs and gains, from the numbers alone."""
    gap, base = outcome.gap(variant), outcome.metrics(BASE)
    spread = max(base) - min(base)
    direction = "worse" if gap > 0 else "better"
    quality = f"{abs(gap):.2f} {direction}" if abs(gap) >= SHOWN / 2 else "equal"
    quality += f" in {outcome.quality}"
    if len(base) > 1:
        quality += f", fp32's own spread over {len(base)} seeds is {spread:.2f}"
    median, low, high = outcome.time_ratio(variant)
    if low <= 1 <= high:
        speed = f"no clear difference in step time ({median:.2f}x)"
    else:
        speed = f"{median:.2f}x the step time ({'faster' if median < 1 else 'SLOWER'})"
    layers, model = outcome.memory_ratios(variant)
    memory = f"for backward its quantised layers keep {layers:.2f}x, the whole model {model:.2f}x the bytes"
    return f"{outcome.title}: {variant} against fp32 is {quality}; {speed}; {memory}."


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the exponential moving average with the time constant ``window``, corrected for its start."""
    keep, total, weight, smoothed = math.exp(-1 / window), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed


def _mean_losses(runs: Sequence[Run]) -> list[float]:
    """Return the loss of each step, averaged over seeds."""
    return [statistics.mean(step) for step in zip(*(run.losses for run in runs), strict=True)]


def figure(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Draw the training loss of every variant, one panel per task, and return the file."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    styles: list[dict[str, Any]] = [{"lw": 5, "alpha": 0.35}, {"ls": "--"}, {}, {"ls": ":"}]
    fig, axes = plt.subplots(1, len(outcomes), figsize=(6.4 * len(outcomes), 4.6), squeeze=False, layout="constrained")
    for axis, outcome in zip(axes[0], outcomes, strict=True):
        for (variant, runs), style in zip(outcome.runs.items(), styles, strict=False):
            losses = [loss * outcome.loss_factor for loss in _mean_losses(runs)]
            axis.plot(range(1, len(losses) + 1), _smooth(losses, max(1, len(losses) // 50)), label=variant, **style)
        seeds = len(outcome.runs[BASE])
        axis.set_title(f"{outcome.title} ({seeds} seed{'s' if seeds > 1 else ''})")
        low, high = axis.dataLim.intervaly
        scale = "log" if low > 0 and high > LOG_RANGE * low else "linear"  # else small losses are all one line
        axis.set_yscale(scale)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(f"{outcome.loss_label}; smoothed, {scale} scale")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return path
