"""Train on two ranks that stall now and then, with DDP and with dropcompute: ``python examples/stragglers.py``.

A small CNN learns scikit-learn's digits, in steps of eight micro-batches. In a tenth of its steps a rank stalls: its
micro-batches then take about three times as long (it sleeps). Stock DistributedDataParallel waits for it; dropcompute
lets it drop what it has not begun when its compute threshold has passed. Both meet the same stalls, in turns, once per
seed. Under a minute on two idle CPU cores; ``--fast`` shows the same output from a few steps.

What it shows is the mechanism: the stalls are simulated, and the gain grows with the number of ranks, of which there
are two. Part of it is not from dropping: Lightning's DDP looks for SIGTERM on the other ranks in every micro-batch,
dropcompute once in a step. ``--delay none`` shows that part by itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file also runs by its path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from examples.common.compare import quiet
from examples.common.data import DigitsData
from examples.common.modules import DigitsCNN
from lightning_eff.functional import Delay, parse_delay
from lightning_eff.strategies import DropComputeStrategy

RANKS, MICRO_BATCHES, BATCH_SIZE = 2, 8, 25
UNDISTURBED_S = 0.015
"""About what one micro-batch takes by itself; a delay is a multiple of it."""


class Stragglers(L.Callback):
    """Sleeps in every micro-batch for as long as the delay says, and notes when steps end and what was computed.

    ``DropComputeStrategy(delay="stall")`` sleeps by itself; DDP has no such argument, and both are to meet the same.

    Args:
        delay: how much longer a micro-batch takes.
        first_step: what the delay takes the first step for, so that seeds meet other stalls.
    """

    def __init__(self, delay: Delay, first_step: int) -> None:
        self.delay, self.first_step = delay, first_step
        self.ends: list[float] = []
        self.computed = [0]  # micro-batches of this rank, up to each of the ends
        self.count = self.place = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ends = [time.perf_counter()]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.place = batch_idx % MICRO_BATCHES

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        self.count += 1  # not called for a micro-batch that is dropped
        step = self.first_step + trainer.global_step
        time.sleep(self.delay.extra_s(step, trainer.global_rank, self.place, UNDISTURBED_S))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == len(self.ends):
            self.ends.append(time.perf_counter())
            self.computed.append(self.count)


@dataclass
class Outcome:
    """What one training came to.

    Attributes:
        seconds: of all steps.
        step_ms: median of the steps that are compared.
        samples_per_s: computed, all ranks together, in the steps that are compared.
        drop_rate: share of their micro-batches that was not computed.
        loss: on the held-out digits.
        accuracy: on them, percent.
    """

    seconds: float
    step_ms: float
    samples_per_s: float
    drop_rate: float
    loss: float
    accuracy: float


def train(strategy: Strategy, delay: Delay, seed: int, steps: int, first: int) -> Outcome:
    """Train on every rank; compare the steps from ``first`` on."""
    L.seed_everything(seed, verbose=False)
    module, data, stragglers = DigitsCNN(64), DigitsData(BATCH_SIZE), Stragglers(delay, 1000 * seed)
    trainer = L.Trainer(
        strategy=strategy,  # <- the one argument that differs
        accumulate_grad_batches=MICRO_BATCHES,
        devices=RANKS,
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[stragglers],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    own = torch.tensor(float(stragglers.computed[-1] - stragglers.computed[first]))
    computed = float(strategy.reduce(own, reduce_op="sum"))
    ends = stragglers.ends
    images, labels = data.validation.tensors
    with torch.no_grad():
        logits = module.eval()(images)
    return Outcome(
        seconds=ends[-1] - ends[0],
        step_ms=1000 * statistics.median(b - a for a, b in pairwise(ends[first:])),
        samples_per_s=computed * BATCH_SIZE / (ends[-1] - ends[first]),
        drop_rate=1 - computed / ((steps - first) * RANKS * MICRO_BATCHES),
        loss=float(F.cross_entropy(logits, labels)),
        accuracy=100 * float((logits.argmax(1) == labels).float().mean()),
    )


def table(found: dict[str, list[Outcome]], first: int) -> Table:
    """Return one column per strategy, means over the seeds."""
    rows = {
        "seconds, all steps": ("seconds", "{:.1f}"),
        f"from step {first} on: computed samples per second": ("samples_per_s", "{:.0f}"),
        "  median step, ms": ("step_ms", "{:.0f}"),
        "  micro-batches dropped": ("drop_rate", "{:.1%}"),
        "held-out loss, nats": ("loss", "{:.3f}"),
        "held-out accuracy, %": ("accuracy", "{:.1f}"),
    }
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("", no_wrap=True)
    for name in found:
        made.add_column(name, justify="right", no_wrap=True)
    for label, (key, form) in rows.items():
        made.add_row(
            label, *(form.format(statistics.mean(getattr(run, key) for run in runs)) for runs in found.values())
        )
    return made


def verdict(found: dict[str, list[Outcome]], delay: str, first: int) -> str:
    """Return what was gained, seed by seed, and what to make of it."""
    pairs = list(zip(found["dropcompute"], found["ddp"], strict=True))
    gains = ", ".join(f"{ours.samples_per_s / ddp.samples_per_s:.2f}x" for ours, ddp in pairs)
    differences = ", ".join(f"{ours.accuracy - ddp.accuracy:+.2f}" for ours, ddp in pairs)
    return (
        f"dropcompute over ddp, seed by seed: {gains} the computed samples per second from step {first} on (before, it "
        f"measures its threshold), {differences} points of accuracy (one held-out digit is {100 / 597:.2f}). Simulated "
        f"delay '{delay}', {RANKS} ranks."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train with both strategies; rank 0 prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each training")
    parser.add_argument("--warmup-steps", type=int, default=20, help="in which dropcompute measures its threshold")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--delay", default="stall", help="or lognormal, stall:p=0.2,factor=5, slow:factor=2, none")
    parser.add_argument("--fast", action="store_true", help="a few steps: shows the output, proves nothing")
    options = parser.parse_args(argv)
    steps, first, seeds = (14, 8, 1) if options.fast else (options.steps, options.warmup_steps, options.seeds)
    quiet()
    torch.set_num_threads(1)
    delay = parse_delay("stall:p=0" if options.delay == "none" else options.delay)
    found: dict[str, list[Outcome]] = {"ddp": [], "dropcompute": []}
    for seed in range(seeds):
        for name, runs in found.items():
            strategy = DDPStrategy() if name == "ddp" else DropComputeStrategy(warmup_steps=first)
            runs.append(train(strategy, delay, seed, steps, first))
    if strategy.global_rank == 0:
        console = Console(file=sys.stdout, width=100)
        console.print(table(found, first))
        console.print(verdict(found, options.delay, first), highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
