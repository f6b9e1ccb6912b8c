"""Train a small CNN and a small GPT in fp32, bf16-mixed and 4 bits, and compare: ``python -m benchmarks.demo``.

Nothing is downloaded: the CNN reads scikit-learn's digits, the GPT the source code of Python's standard library. The
only difference between the runs is the ``precision=`` (or ``plugins=``) argument of the Trainer. Under five minutes on
two CPU cores; ``--fast`` shows the same output from a few steps in some seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import lightning_eff  # noqa: F401 - makes precision="luq4" known to Lightning
from benchmarks.tasks.compare import Task, quiet, step_seconds, train
from benchmarks.tasks.data import DigitsData, StdlibText
from benchmarks.tasks.modules import CharGPT, DigitsCNN
from benchmarks.tasks.summary import Outcome, figure, outcome_table, verdict
from lightning_eff import LUQPrecision

VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "fp32": lambda: {"precision": "32-true"},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "luq4": lambda: {"precision": "luq4"},
    "luq4 SMP-2": lambda: {"plugins": [LUQPrecision(samples=2)]},
}
"""What the user changes. SMP-2 averages two samples of each weight gradient: less noise, more time."""


def digits(options: argparse.Namespace) -> tuple[Task, dict[str, Any]]:
    """Return the CNN task and how its numbers are shown."""
    width, epochs = (16, 1) if options.fast else (64, 12)
    task = Task("CNN on digits", "val_accuracy", lambda _seed: (DigitsCNN(width), DigitsData()), epochs)
    shown = {"quality": "accuracy (%)", "factor": 100.0, "higher_is_better": True}
    return task, {**shown, "loss_label": "training loss, nats", "loss_factor": 1.0}


def text(options: argparse.Namespace) -> tuple[Task, dict[str, Any]]:
    """Return the GPT task and how its numbers are shown."""
    size = {"width": 32, "layers": 2, "context": 32} if options.fast else {"width": 256, "layers": 2, "context": 64}
    steps = options.steps or (6 if options.fast else 400)

    def build(seed: int) -> tuple[CharGPT, StdlibText]:
        windows = 16 if options.fast else 256
        return CharGPT(**size), StdlibText(size["context"], steps=steps, seed=seed, validation_windows=windows)

    bits = 1 / torch.log(torch.tensor(2.0)).item()
    shown = {"quality": "bits per character", "factor": 1.0, "higher_is_better": False}
    return Task("GPT on Python source", "val_bits_per_char", build), {
        **shown,
        "loss_label": "training loss, bits per character",
        "loss_factor": bits,
    }


def compare(task: Task, shown: dict[str, Any], seeds: int, options: argparse.Namespace, console: Console) -> Outcome:
    """Train every variant with every seed, then time the variants in turns."""
    show = seeds > 1  # what luq4 says about the layers it converted, once
    runs: dict[str, list[Any]] = {variant: [] for variant in VARIANTS}
    for seed in range(seeds):
        for variant, arguments in VARIANTS.items():
            with console.status(f"{task.name}: {variant}, seed {seed}"):
                runs[variant].append(train(task, arguments(), seed, show=show and seed == 0 and variant == "luq4"))
    with console.status(f"{task.name}: timing"):
        step_s = step_seconds(task, VARIANTS, rounds=2 if options.fast else 5, steps=3 if options.fast else 10)
    return Outcome(task.name, runs=runs, step_s=step_s, **shown)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, print the tables and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="a few tiny steps: shows the output, proves nothing")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the CNN; the GPT is trained with one")
    parser.add_argument("--steps", type=int, help="training steps of the GPT (default 400)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the figure")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; with 1, CPU time is measured")
    options = parser.parse_args(argv)
    quiet()
    torch.set_num_threads(options.threads)
    console = Console(file=sys.stdout)
    outcomes = []
    for make, seeds in ((digits, options.seeds), (text, 1)):
        task, shown = make(options)
        outcomes.append(compare(task, shown, seeds, options, console))
        console.print(outcome_table(outcomes[-1]))
    path = figure(outcomes, options.output / "loss_curves.png")
    for outcome in outcomes:
        console.print(verdict(outcome), highlight=False, soft_wrap=True)
    console.print(f"Loss curves: {path}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
