"""Plan DropCompute: step time, drop rate and speed-up against the number of workers, from a recorded run.

    python -m lightning_eff plan dropcompute --timings run.csv --workers 8,64,200,1024

Every repetition resamples the recording, so that the spread shows how much the recording settles, and does what the
strategy does: it looks at a window of steps without dropping, chooses the threshold, and trains on. The steps it trains
on are others than those of the window, so that a threshold that fitted the window's luck shows. All workers start a
step together, when the reduction of the one before is over; within the step they meet nowhere. So a worker's events are
its own (:func:`completed`, the decision of the strategy) until the slowest is done.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Generator

from lightning_eff.checks import Whole, check
from lightning_eff.errors import ConfigurationError, MissingDependencyError
from lightning_eff.functional.stragglers.model import MIN_GAIN, best_threshold, ideal_speedup, ideal_threshold
from lightning_eff.functional.stragglers.simulated import parse_delay
from lightning_eff.functional.stragglers.threshold import (
    MAX_DROP_RATE,
    check_min_micro_batches,
    completed,
    compute_times,
)
from lightning_eff.plan.timings import BootstrapSource, DelaySource, FittedSource, Source, read_timings
from lightning_eff.runtime import figures

WINDOW_STEPS = 44
"""Steps the threshold is chosen from, as in the published code (steps 6 to 49)."""
MOST_CELLS = 1 << 27
"""Times of a window, which is looked at as a whole."""
_CELLS = 1 << 21  # micro-batches simulated at a time: 16 MiB a table


class Row(NamedTuple):
    """Holds the plan for one number of workers; means over the repetitions.

    Attributes:
        workers: N.
        tau_s: chosen threshold, median, seconds; inf if dropping gains nothing.
        plain_step_s: seconds per step without dropping.
        step_s: seconds per step with dropping.
        drop_rate: share of the micro-batches that is not computed.
        speedup: samples per second, relative to no dropping.
        speedup_std: standard deviation of ``speedup`` between repetitions.
        plain_scaling: samples per second without dropping, relative to one worker.
        scaling: samples per second with dropping, relative to one worker.
        ideal_tau_s: threshold that the paper's idealised formula chooses, median, seconds.
        ideal_speedup: what that formula promises for it.
        ideal_realised: what it gives, begun micro-batches being finished.
    """

    workers: int
    tau_s: float
    plain_step_s: float
    step_s: float
    drop_rate: float
    speedup: float
    speedup_std: float
    plain_scaling: float
    scaling: float
    ideal_tau_s: float
    ideal_speedup: float
    ideal_realised: float


class Simulated(NamedTuple):
    """Holds some steps of a run with one threshold.

    Attributes:
        step_s: mean seconds per step.
        alone_s: mean seconds per step of one worker that waits for nobody.
        kept: share of the micro-batches that is computed.
    """

    step_s: float
    alone_s: float
    kept: float


def simulate(
    source: Source,
    workers: int,
    taus: Sequence[float],
    *,
    steps: int,
    min_micro_batches: int = 1,
    generator: Generator,
) -> list[Simulated]:
    """Run the same ``steps`` steps once with each threshold.

    Args:
        source: of the steps.
        workers: N, 1 or more; memory does not grow with ``steps``.
        taus: compute thresholds, seconds; inf for no dropping.
        steps: 1 or more.
        min_micro_batches: computed however late a worker is.
        generator: seeded by the caller.
    """
    sums = torch.zeros(len(taus), 3, dtype=torch.float64, device="cpu")
    at_a_time = max(1, _CELLS // (workers * source.micro_batches))
    for start in range(0, steps, at_a_time):
        table, other = source.draw(min(at_a_time, steps - start), workers, generator)
        for c, tau in enumerate(taus):
            counts = completed(table, tau, min_micro_batches)
            worker_s = compute_times(table, counts)
            step_s, alone_s = worker_s.amax(-1) + other, worker_s.mean(-1) + other
            kept = counts.sum(dtype=torch.float64) / (workers * source.micro_batches)
            sums[c] += torch.stack([step_s.sum(), alone_s.sum(), kept])
    return [Simulated(*row) for row in (sums / steps).tolist()]


def plan_row(
    source: Source,
    workers: int,
    *,
    steps: int = 200,
    window_steps: int = WINDOW_STEPS,
    repetitions: int = 10,
    min_micro_batches: int = 1,
    max_drop_rate: float = MAX_DROP_RATE,
    min_gain: float = MIN_GAIN,
    seed: int = 0,
) -> Row:
    """Plan for one number of workers.

    Args:
        source: of the steps.
        workers: N, 1 or more.
        steps: trained steps of a repetition, on which everything is measured.
        window_steps: steps before them, from which the threshold is chosen.
        repetitions: independent runs; two or more give a spread.
        min_micro_batches: computed however late a worker is.
        max_drop_rate: highest share of micro-batches that may be dropped in the window.
        min_gain: least gain in the window for which anything is dropped.
        seed: of repetition 0; the result is a function of it.

    Raises:
        ConfigurationError: an argument is not allowed.
    """
    workers, steps = check("workers", workers, Whole(1)), check("steps", steps, Whole(1))
    window_steps = check("window_steps", window_steps, Whole(1))
    repetitions = check("repetitions", repetitions, Whole(1, 10_000))
    seed = check("seed", seed, Whole(0, 2**62))
    cells = window_steps * workers * source.micro_batches
    if cells > MOST_CELLS:
        raise ConfigurationError(
            f"window_steps={window_steps} x workers={workers} x {source.micro_batches} micro-batches is a table of "
            f"{cells:,} times, more than {MOST_CELLS:,} (1 GiB). Plan for fewer workers, or with a shorter window."
        )
    min_micro_batches = check_min_micro_batches(min_micro_batches, source.micro_batches)
    runs = []
    for repetition in range(repetitions):
        generator = torch.Generator().manual_seed(seed + repetition)
        cluster = source.again(generator)
        window = cluster.draw(window_steps, workers, generator)
        tau = best_threshold(
            *window, min_micro_batches=min_micro_batches, max_drop_rate=max_drop_rate, min_gain=min_gain
        )
        ideal_tau = ideal_threshold(*window)
        taus = (math.inf, tau, ideal_tau)
        measured = simulate(
            cluster, workers, taus, steps=steps, min_micro_batches=min_micro_batches, generator=generator
        )
        runs.append(_repetition(workers, tau, ideal_tau, ideal_speedup(*window, ideal_tau), measured))
    return _mean_row(runs)


def _repetition(workers: int, tau: float, ideal_tau: float, promised: float, measured: Sequence[Simulated]) -> Row:
    plain, ours, ideal = measured
    speedup = ours.kept * plain.step_s / ours.step_s
    scaling = workers * plain.alone_s / plain.step_s
    return Row(
        workers=workers,
        tau_s=tau,
        plain_step_s=plain.step_s,
        step_s=ours.step_s,
        drop_rate=1 - ours.kept,
        speedup=speedup,
        speedup_std=0.0,
        plain_scaling=scaling,
        scaling=scaling * speedup,
        ideal_tau_s=ideal_tau,
        ideal_speedup=promised,
        ideal_realised=ideal.kept * plain.step_s / ideal.step_s,
    )


def _mean_row(runs: Sequence[Row]) -> Row:
    """Return means of the columns, medians of the thresholds (one may be inf), and the spread of the speed-up."""
    mean = Row(runs[0].workers, *(statistics.fmean(column) for column in list(zip(*runs, strict=True))[1:]))
    return mean._replace(
        tau_s=statistics.median(run.tau_s for run in runs),
        ideal_tau_s=statistics.median(run.ideal_tau_s for run in runs),
        speedup_std=statistics.stdev(run.speedup for run in runs) if len(runs) > 1 else 0.0,
    )


def table(rows: Sequence[Row]) -> Table:
    """Return the table that shows people the rows."""
    title = "DropCompute: samples per second against plain synchronous training"
    out = Table(title=title, title_justify="left")
    for name in ("workers", "tau", "plain step", "step", "dropped", "plain", "scaling", "speed-up", "formula: tau"):
        out.add_column(name, justify="right")
    out.add_column("promises", justify="right")
    out.add_column("gives", justify="right")
    for row in rows:
        out.add_row(
            f"{row.workers:,}",
            f"{row.tau_s:.4g} s",
            f"{row.plain_step_s:.4g} s",
            f"{row.step_s:.4g} s",
            f"{row.drop_rate:.1%}",
            f"{row.plain_scaling:.4g}x",
            f"{row.scaling:.4g}x",
            f"{row.speedup:.3f} +- {row.speedup_std:.3f}",
            f"{row.ideal_tau_s:.4g} s",
            f"{row.ideal_speedup:.3f}",
            f"{row.ideal_realised:.3f}",
        )
    return out


PICTURE = "dropcompute-plan.png"
_LEGEND = (
    "plain, scaling: samples per second relative to one worker, without and with dropping. speed-up: with relative to "
    "without, +- one standard deviation between repetitions. formula: the paper's, which stops a worker in the middle "
    "of a micro-batch: the threshold it chooses, the speed-up it promises, and the one that threshold gives."
)


def figure(rows: Sequence[Row], path: str | Path) -> None:
    """Draw scaling and speed-up against the number of workers.

    Args:
        rows: of :func:`plan_row`.
        path: of the image; its suffix is the format.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ConfigurationError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        need = "The plot needs matplotlib: pip install 'lightning-eff[plot]', or leave it out with --no-plot."
        raise MissingDependencyError(need) from error
    workers = [row.workers for row in rows]
    drawing = Figure(figsize=(10, 4.2), layout="constrained")
    scaling, gain = drawing.subplots(1, 2)
    scaling.plot(workers, [row.plain_scaling / row.workers for row in rows], marker="o", label="without dropping")
    scaling.plot(workers, [row.scaling / row.workers for row in rows], marker="o", label="DropCompute")
    scaling.set(ylim=(0, None), ylabel="samples/s per worker, relative to one worker alone")
    spread = [row.speedup_std for row in rows]
    gain.errorbar(workers, [row.speedup for row in rows], yerr=spread, marker="o", capsize=3, label="DropCompute")
    gain.plot(workers, [row.ideal_realised for row in rows], marker=".", label="threshold of the paper's formula")
    gain.plot(workers, [row.ideal_speedup for row in rows], linestyle="--", color="0.5", label="the formula's promise")
    gain.axhline(1.0, color="0.7", linestyle=":")
    gain.set(ylabel="samples/s relative to no dropping")
    for axis in (scaling, gain):
        axis.set(xscale="log", xlabel="workers")
        axis.set_xticks(workers, [f"{n:,}" for n in workers])
        axis.minorticks_off()
        axis.legend()
    try:
        drawing.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"The plot cannot be written to {str(path)!r}: {error}.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_eff plan dropcompute", description=__doc__.splitlines()[0]
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--timings", metavar="CSV", help="micro-batch times of a run recorded without dropping")
    given.add_argument("--delay", help="simulate instead: lognormal, stall:p=0.1,factor=3, or a file to replay")
    parser.add_argument("--workers", type=_numbers, required=True, metavar="N,N,...", help="for example 8,64,200,1024")
    parser.add_argument("--fitted", action="store_true", help="fit a distribution to the timings instead of resampling")
    parser.add_argument("--micro-batches", type=int, default=12, help="with --delay: per worker and step (%(default)s)")
    parser.add_argument(
        "--base-s", type=float, default=1.0, help="with --delay: undisturbed micro-batch (%(default)s s)"
    )
    parser.add_argument(
        "--other-s", type=float, default=0.0, help="with --delay: step outside the loop (%(default)s s)"
    )
    parser.add_argument("--min-micro-batches", type=int, default=1, help="computed however late (%(default)s)")
    parser.add_argument(
        "--max-drop-rate", type=float, default=MAX_DROP_RATE, help="highest share dropped (%(default)s)"
    )
    parser.add_argument("--min-gain", type=float, default=MIN_GAIN, help="least gain worth dropping (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps per repetition (%(default)s)")
    parser.add_argument("--window-steps", type=int, default=WINDOW_STEPS, help="steps tau is chosen from (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=10, help="independent runs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling and the delay (%(default)s)")
    parser.add_argument("--plot", metavar="FILE", help=f"image to write ({PICTURE}, if matplotlib is there)")
    parser.add_argument("--no-plot", action="store_true", help="print the table only")
    return parser


def _numbers(text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between them") from error
    if numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of workers is 1 or more")
    return numbers


def _source(options: argparse.Namespace) -> Source:
    if options.delay is None:
        timings = read_timings(options.timings)
        return FittedSource(timings) if options.fitted else BootstrapSource(timings)
    if options.fitted:
        raise ConfigurationError("--fitted fits recorded timings; it does not go with --delay.")
    return DelaySource(
        parse_delay(options.delay, seed=options.seed),
        options.micro_batches,
        base_s=options.base_s,
        other_s=options.other_s,
    )


def main(argv: Sequence[str] | None = None, *, console: Console | None = None) -> int:
    """Print the plan, draw it, and return the exit status.

    Raises:
        EffError: an argument or the file is not allowed, or a picture was asked for without matplotlib; the caller
            prints it.
    """
    options = _parser().parse_args(argv)
    console = console or figures.console(160)
    source = _source(options)
    names = ("steps", "window_steps", "repetitions", "min_micro_batches", "max_drop_rate", "min_gain", "seed")
    settings = {name: getattr(options, name) for name in names}
    rows = [plan_row(source, workers, **settings) for workers in options.workers]
    console.print(table(rows))
    console.print(_LEGEND, style="dim", highlight=False)
    if options.workers[-1] > source.worker_steps:
        console.print(
            f"Only {source.worker_steps:.0f} worker-steps were recorded: with more workers than that, the slowest "
            "one is in every step and nothing slower ever happens. Record longer, or extrapolate with --fitted.",
            highlight=False,
        )
    if not options.no_plot:
        _draw(rows, options.plot, console)
    return 0


def _draw(rows: Sequence[Row], path: str | None, console: Console) -> None:
    """Draw the plan; without matplotlib say so, unless a picture was asked for."""
    try:
        figure(rows, path or PICTURE)
    except MissingDependencyError as error:
        if path is not None:
            raise
        console.print(f"No picture was drawn. {error}", highlight=False, markup=False)
    else:
        console.print(f"plot: {path or PICTURE}", highlight=False)
