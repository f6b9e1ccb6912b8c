"""Validation metric of ``strategy="dropcompute"`` at given drop rates: at equal steps, and at equal computed samples.

Who drops what is planned, not timed: the micro-batches that ranks under the paper's log-normal delays would not begin,
with the threshold at which the wanted share of them is dropped. Two gloo ranks train with the strategy itself, its
clock replaced by the plan. ``equal steps`` loses the samples; ``equal samples`` adds steps for them
(``compensate="extra_steps"``), and the learning rate schedule stretches along. ``--drop-rates`` includes a control that
drops so much that it should show. Small tasks, few seeds: a difference here is a hint, the absence of one proves
little.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import io
import math
import statistics
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks._ranks import launch
from benchmarks._report import Report, Row, add_common_arguments
from benchmarks._stats import spread
from benchmarks.tasks.data import DigitsData, StdlibText
from benchmarks.tasks.modules import CharGPT, DigitsCNN
from lightning_eff.functional.stragglers.simulated import LognormalDelay
from lightning_eff.functional.stragglers.threshold import completed
from lightning_eff.strategies import DropComputeStrategy

RANKS, MICRO_BATCHES, WARM_UP = 2, 8, 0.1
Compensate = Literal["extra_steps"] | None
TASKS: dict[str, tuple[str, float, str, int]] = {
    "digits": ("val_accuracy", 100.0, "% accuracy", -1),
    "gpt": ("val_bits_per_char", 1.0, "bits/char", 1),
}
"""Name -> (metric, factor into the unit, unit, sign that makes a positive difference a worse one)."""


def planned_counts(rate: float, steps: int, seed: int) -> Tensor:
    """Micro-batches that every rank computes in every step, (steps, ranks), of which ``rate`` are missing in all.

    Example:
        >>> counts = planned_counts(0.1, 200, seed=0)
        >>> round(1 - counts.sum().item() / (200 * RANKS * MICRO_BATCHES), 2)
        0.1
    """
    table = LognormalDelay(seed=seed).table(steps, RANKS, MICRO_BATCHES)
    taus = [*table.cumsum(-1).flatten().sort().values.tolist(), math.inf]

    def kept(tau: float) -> float:
        return int(completed(table, tau).sum()) / table.numel()

    return completed(table, taus[bisect.bisect_left(taus, 1 - rate, key=kept)])


class Planned(DropComputeStrategy):
    """The strategy, its clock replaced: every rank stops after as many micro-batches as the plan says.

    Args:
        counts: see :func:`planned_counts`.
        compensate: of the strategy.
    """

    def __init__(self, counts: Tensor, compensate: Compensate) -> None:
        super().__init__(threshold=1.0, compensate=compensate, process_group_backend="gloo")
        self.counts, self.computed = counts.tolist(), 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the micro-batch if the plan says so."""
        goes_on = self._window.offered < self.counts[self._steps][self.global_rank]
        self.threshold_s = math.inf if goes_on else -1.0
        self.computed += goes_on
        return super().training_step(*args, **kwargs)


class _Stretched(L.LightningModule):
    """AdamW with warm-up and cosine decay over as many steps as the Trainer is to make by now."""

    lr: float

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.01)

        def factor(step: int) -> float:
            at = min((step + 1) / self.trainer.max_steps, 1.0)
            return at / WARM_UP if at < WARM_UP else (1 + math.cos(math.pi * (at - WARM_UP) / (1 - WARM_UP))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _StretchedCNN(_Stretched, DigitsCNN):
    pass


class _StretchedGPT(_Stretched, CharGPT):
    pass


class _Sharded(L.LightningDataModule):
    """Every rank trains on its own part of the data and validates on all of it."""

    def __init__(self, data: DigitsData | StdlibText) -> None:
        super().__init__()
        self.data = data

    def setup(self, stage: str | None = None) -> None:
        self.data.setup(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        shuffled = isinstance(self.data, DigitsData)
        sampler: DistributedSampler[Any] = DistributedSampler(self.data.train, shuffle=shuffled, drop_last=True)
        return DataLoader(self.data.train, self.data.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.data.val_dataloader()


def _build(task: str, steps: int, seed: int, tiny: bool) -> tuple[L.LightningModule, DigitsData | StdlibText]:
    """Return module and data; the text is long enough for twice the steps."""
    if task == "digits":
        return _StretchedCNN(4 if tiny else 32), DigitsData(batch_size=5)
    width, context = (16, 16) if tiny else (128, 64)
    text = StdlibText(context, 2, 2 * steps * RANKS * MICRO_BATCHES, seed, validation_windows=8 if tiny else 256)
    return _StretchedGPT(width, 2, 4, context), text


def _train(task: str, rate: float, compensate: Compensate, steps: int, seed: int, tiny: bool) -> dict[str, float]:
    L.seed_everything(seed, verbose=False)
    module, data = _build(task, steps, seed, tiny)
    strategy = Planned(planned_counts(rate, 2 * steps + 10, seed), compensate)
    trainer = L.Trainer(
        strategy=strategy,
        accumulate_grad_batches=MICRO_BATCHES,
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=dist.get_world_size(),
        use_distributed_sampler=False,
        check_val_every_n_epoch=10**6,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(module, _Sharded(data))
        (found,) = trainer.validate(module, _Sharded(data), verbose=False)
    computed = torch.tensor(float(strategy.computed))
    dist.all_reduce(computed)
    metric, factor, _, _ = TASKS[task]
    offered = steps * RANKS * MICRO_BATCHES
    return {"metric": found[metric] * factor, "steps": trainer.global_step, "samples": float(computed) / offered}


def _variants(rates: Sequence[float]) -> Iterator[tuple[float, Compensate]]:
    for rate in rates:
        yield rate, None
        if rate:
            yield rate, "extra_steps"


def _measure(task: str, rates: Sequence[float], steps: int, seeds: int, tiny: bool) -> Iterator[Any]:
    """On every rank: train every variant with every seed, seeds outermost."""
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # every rank validates on everything
    found: dict[tuple[float, Compensate], list[dict[str, float]]] = {key: [] for key in _variants(rates)}
    for seed in range(seeds):
        for (rate, compensate), runs in found.items():
            runs.append(_train(task, rate, compensate, steps, seed, tiny))
    yield found


def _add_rows(report: Report, task: str, found: dict[tuple[float, Compensate], list[dict[str, float]]]) -> None:
    _, _, unit, sign = TASKS[task]
    base = found[0.0, None]
    for (rate, compensate), runs in found.items():
        values = [run["metric"] for run in runs]
        worse = [sign * (run["metric"] - plain["metric"]) + 0.0 for run, plain in zip(runs, base, strict=True)]
        steps, samples = (statistics.mean(run[key] for run in runs) for key in ("steps", "samples"))
        settings: dict[str, str | int] = {"task": task, "seeds": len(runs), "steps": f"{steps:.0f}"}
        settings["computed"] = f"{samples:.1%}"
        settings["worse than 0 %, mean (min..max)"] = (
            f"{statistics.mean(worse):+.3f} ({min(worse):+.3f}..{max(worse):+.3f})"
        )
        pair = f"{rate:.0%} dropped" + (f", equal {'samples' if compensate else 'steps'}" if rate else "")
        report.add(Row(settings, pair, spread(values), unit=unit, details={"runs": runs, "worse": worse}))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dropcompute_quality", description=__doc__)
    parser.add_argument("--task", default="digits,gpt", help=f"comma-separated, of {', '.join(TASKS)}")
    parser.add_argument("--drop-rates", default="0.05,0.1,0.4", help="comma-separated, above 0 and at most 0.5")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--digits-steps", type=int, default=180, help="15 are one pass over the digits")
    parser.add_argument("--gpt-steps", type=int, default=250)
    parser.add_argument("--tiny", action="store_true", help="sizes for testing the benchmark itself")
    add_common_arguments(parser)
    options = parser.parse_args(argv)
    rates = [0.0, *(float(rate) for rate in options.drop_rates.split(","))]
    if unknown := set(options.task.split(",")) - set(TASKS):
        parser.error(f"unknown tasks {sorted(unknown)}; known: {', '.join(TASKS)}")
    if not all(0 < rate <= 0.5 for rate in rates[1:]):
        parser.error("--drop-rates: each is above 0 and at most 0.5")
    if options.device != "cpu":
        parser.error("the ranks talk gloo: --device cpu only")
    report = Report("dropcompute_quality", ("task", "seeds", "steps", "computed", "worse than 0 %, mean (min..max)"))
    for task in options.task.split(","):
        steps = 4 if options.tiny else getattr(options, f"{task}_steps")
        for found in launch(_measure, RANKS, task, rates, steps, options.seeds, options.tiny):
            _add_rows(report, task, found)
    return report.finish(options)


if __name__ == "__main__":
    raise SystemExit(main())
