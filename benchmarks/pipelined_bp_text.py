"""Train a GPT as a pipeline of two processes, and in one: ``python -m benchmarks.pipelined_bp_text``.

A small GPT learns the source code of the Python standard library. The pipeline has its first blocks in one process and
its last in the other, and updates with every micro-batch without ever draining; late gradients are allowed for by
weight prediction. The LightningModule knows nothing of it. Two minutes on two idle CPU cores; ``--fast`` shows the same
output from a few steps.

Adam suffers from delay more than SGD does, so stages run ahead of each other by one micro-batch here (``--in-flight 2``
is the strategy's default and the paper's schedule: a little faster, twice the delay).

What it shows is the mechanism. Both runs have one thread per process. On one machine with two cores, one process with
two threads or DDP would use them as well: pipelines are for models that do not fit, and for links too slow for DDP.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.tasks.compare import quiet
from benchmarks.tasks.data import StdlibText
from benchmarks.tasks.modules import CharGPT
from lightning_eff.strategies import PipelinedBPStrategy

FIRST = 10
"""Steps that are not timed."""


class Clock(L.Callback):
    """Notes when training steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.ends.append(time.perf_counter())


@dataclass
class Outcome:
    """What one training came to.

    Attributes:
        step_ms: mean of the timed steps.
        bits: per character of held-out text.
    """

    step_ms: float
    bits: float


def train(strategy: str | Strategy, devices: int, options: argparse.Namespace, steps: int) -> Outcome:
    """Train, then validate."""
    L.seed_everything(options.seed, verbose=False)
    module, data, clock = CharGPT(width=128, layers=4, lr=3e-4), StdlibText(batch_size=options.batch_size), Clock()
    trainer = L.Trainer(
        strategy=strategy,  # <- the one thing that differs,
        devices=devices,  # <- besides the number of processes
        accelerator="cpu",
        max_steps=steps,
        check_val_every_n_epoch=1000,  # once, below
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=options.output,
    )
    trainer.fit(module, data)
    (found,) = trainer.validate(module, data, verbose=False)
    seconds = clock.ends[-1] - clock.ends[FIRST - 1]
    return Outcome(1000 * seconds / (len(clock.ends) - FIRST), float(found["val_bits_per_char"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Train both ways; rank 0 prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each training")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of 128 characters in a micro-batch")
    parser.add_argument(
        "--in-flight", type=int, default=1, help="by how many micro-batches a stage runs ahead of the next"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="demo_output", help="folder for the picture of the schedule")
    parser.add_argument("--fast", action="store_true", help="a few steps: shows the output, proves nothing")
    options = parser.parse_args(argv)
    steps = FIRST + 6 if options.fast else options.steps
    quiet()
    torch.set_num_threads(1)
    is_second_process = "LOCAL_RANK" in os.environ  # Lightning starts this file again for it
    alone = None if is_second_process else train("auto", 1, options, steps)
    ours = train(PipelinedBPStrategy(in_flight=options.in_flight), 2, options, steps)
    if alone is not None:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("", "one process", "pipelined_bp, 2 processes"):
            table.add_column(column, justify="left" if not column else "right")
        table.add_row("ms per step", f"{alone.step_ms:.1f}", f"{ours.step_ms:.1f}")
        table.add_row("held-out bits per character", f"{alone.bits:.3f}", f"{ours.bits:.3f}")
        console = Console(file=sys.stdout, width=100)
        console.print(table)
        console.print(
            f"pipelined_bp: {alone.step_ms / ours.step_ms:.2f}x one process, {ours.bits - alone.bits:+.3f} bits per "
            f"character after {steps} steps of {options.batch_size} windows (one seed).",
            highlight=False,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
