"""Train on two ranks that stall now and then, with DDP and with dropcompute: ``python examples/stragglers.py``.

In a tenth of its steps a rank stalls: its micro-batches then take about three times as long (it sleeps). Stock
DistributedDataParallel waits for it; dropcompute lets it drop what it has not begun when its compute threshold has
passed. What it shows is the mechanism: the stalls are simulated, and the gain grows with the number of ranks, of which
there are two. Half a minute on two idle CPU cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff import DropComputeStrategy
from lightning_eff.functional import Delay, parse_delay

MICRO_BATCHES, BATCH = 8, 28  # micro-batches in a step, samples in one: whole steps on two ranks


class Stragglers(L.Callback):
    """Sleeps for as long as the delay says, and notes when steps end. Both strategies meet the same stalls."""

    def __init__(self, delay: Delay, first: int) -> None:
        self.delay, self.first, self.ends, self.computed = delay, first, [time.perf_counter()], 0

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        step, rank = trainer.global_step, trainer.global_rank
        self.computed += step >= self.first  # not called for a micro-batch that is dropped
        time.sleep(self.delay.extra_s(step, rank, 0, 0.015))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == len(self.ends):
            self.ends.append(time.perf_counter())


class YourModule(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(argv: list[str] | None = None) -> None:
    """Train with both strategies, in the same two processes; rank 0 prints what each did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each training")
    parser.add_argument("--delay", default="stall", help="or lognormal, stall:p=0.2,factor=5, slow:rank=1,factor=2")
    parser.add_argument("--warmup-steps", type=int, default=20, help="in which dropcompute measures its threshold")
    options = parser.parse_args(argv)
    first = options.warmup_steps
    if options.steps < first + 2:
        parser.error(f"--steps {options.steps}: the first {first} are not compared; give at least {first + 2}")
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images[:1792], dtype=torch.float32) / 16, torch.tensor(labels[:1792]))
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
    for strategy in (DDPStrategy(), DropComputeStrategy(warmup_steps=first)):  # <- the one argument that differs
        L.seed_everything(0, verbose=False)
        clock = Stragglers(parse_delay(options.delay), first)
        trainer = L.Trainer(
            strategy=strategy, accumulate_grad_batches=MICRO_BATCHES, devices=2, accelerator="cpu",
            max_steps=options.steps, callbacks=[clock], enable_model_summary=False, **quiet,
        )  # fmt: skip
        trainer.fit(YourModule(), DataLoader(data, batch_size=BATCH, shuffle=True))
        computed = float(strategy.reduce(torch.tensor(float(clock.computed)), reduce_op="sum"))
        if trainer.is_global_zero:
            seconds, step_s = clock.ends[-1] - clock.ends[first], [b - a for a, b in pairwise(clock.ends[first:])]
            dropped = 1 - computed / (len(step_s) * 2 * MICRO_BATCHES)
            print(
                f"{type(strategy).__name__}: {BATCH * computed / seconds:.0f} computed samples per second, median step "
                f"{1000 * statistics.median(step_s):.0f} ms, {dropped:.1%} of the micro-batches dropped"
            )


if __name__ == "__main__":
    main()
