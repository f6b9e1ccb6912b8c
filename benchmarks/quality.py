"""Validation metric after equal steps: fp32, 4 bits, and 4 bits with parts of LUQ removed.

Run ``python -m benchmarks.quality``. The ablations say what each part is for: ``no-underflow`` rounds gradients below
the smallest level to zero or to it, instead of keeping them in expectation; ``no-log-rounding`` rounds all others to
the nearest power of two; ``nearest`` does both (plain biased FP4). They are compared with ``luq4-all-layers``: first
and last layer are converted too, because the gradient of the classifier has the heaviest tail. Small tasks, few steps:
a difference here is a hint, the absence of one proves little.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import lightning_eff  # noqa: F401 - makes the precision strings known
from benchmarks._measure import threads
from benchmarks._report import Report, Row, add_common_arguments
from benchmarks._stats import spread
from examples.common.compare import Task, quiet, train
from examples.common.data import DigitsData, StdlibText
from examples.common.modules import CharGPT, DigitsCNN

OPTIONS: dict[str, dict[str, Any]] = {
    "luq4": {},
    "luq4-smp2": {"samples": 2},
    "luq4-levels8": {"levels": 8},
    "luq4-hindsight": {"hindsight": 0.1},
    "luq4-all-layers": {"exempt_first_last": False},
    "luq4-no-underflow": {"exempt_first_last": False, "gradient_rounding": "no_underflow"},
    "luq4-no-log-rounding": {"exempt_first_last": False, "gradient_rounding": "no_log_rounding"},
    "luq4-nearest": {"exempt_first_last": False, "gradient_rounding": "nearest"},
}
"""Variant -> options of ``LUQPrecision``."""
FINE_TUNED = "luq4-fine-tuned"
"""``luq4`` whose last ``--steps`` / 5 steps run with INT4 weights alone, peaking at the GPT's learning rate."""
VARIANTS = ("fp32", "bf16-mixed", "fp8", *OPTIONS, FINE_TUNED)


def arguments(variant: str, steps: int) -> dict[str, Any]:
    """Return the Trainer arguments of one variant for a run of ``steps`` optimizer steps."""
    if variant == FINE_TUNED:
        from lightning_eff.callbacks import LUQFineTuning

        return {"precision": "luq4", "callbacks": [LUQFineTuning(max(steps // 5, 1), base_lr=1e-3)]}
    if variant == "fp32":
        return {"precision": "32-true"}
    if variant not in OPTIONS:  # bf16-mixed, fp8
        return {"precision": variant}
    from lightning_eff.precision import LUQPrecision

    return {"plugins": [LUQPrecision(**OPTIONS[variant])]}


def digits(options: argparse.Namespace) -> Task:
    """Return the CNN task; its metric is accuracy."""
    width, epochs = (8, 1) if options.tiny else (32, options.epochs)
    return Task("digits", "val_accuracy", lambda _seed: (DigitsCNN(width), DigitsData()), epochs)


def gpt(options: argparse.Namespace) -> Task:
    """Return the GPT task; its metric is bits per character."""
    width, context, steps = (16, 16, 3) if options.tiny else (128, 64, options.steps)

    def build(seed: int) -> tuple[CharGPT, StdlibText]:
        windows = 8 if options.tiny else 256
        return CharGPT(width, 2, 4, context), StdlibText(context, steps=steps, seed=seed, validation_windows=windows)

    return Task("gpt", "val_bits_per_char", build)


TASKS: dict[str, tuple[Callable[[argparse.Namespace], Task], float, str, int]] = {
    "digits": (digits, 100.0, "% accuracy", -1),
    "gpt": (gpt, 1.0, "bits/char", 1),
}
"""Name -> (task, factor into the unit, unit, sign that makes a positive difference a worse one)."""


def measure(report: Report, name: str, options: argparse.Namespace) -> None:
    """Train every variant with every seed, seeds outermost, and add a row per variant."""
    make, factor, unit, sign = TASKS[name]
    task, variants = make(options), list(dict.fromkeys(["fp32", *options.variants.split(",")]))
    found: dict[str, list[float]] = {variant: [] for variant in variants}
    for seed in range(options.seeds):
        for variant in variants:
            found[variant].append(train(task, arguments(variant, options.steps), seed).metric * factor)
    base = found["fp32"]
    for variant, values in found.items():
        worse = [sign * (ours - theirs) for ours, theirs in zip(values, base, strict=True)]  # same seed, same data
        settings: dict[str, str | int] = {"task": name, "seeds": options.seeds}
        settings["mean"] = f"{statistics.mean(values):.3f}"
        settings["worse than fp32, mean (min..max)"] = (
            f"{statistics.mean(worse):+.3f} ({min(worse):+.3f}..{max(worse):+.3f})"
        )
        details = {"values": values, "worse_than_fp32": worse}
        report.add(Row(settings, variant, spread(values), unit=unit, details=details))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--task", default="digits,gpt", help="comma-separated, of digits, gpt")
    variants = [variant for variant in VARIANTS if variant != "bf16-mixed"]
    parser.add_argument("--variants", default=",".join(variants), help=f"comma-separated, of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12, help="passes over the digits")
    parser.add_argument("--steps", type=int, default=400, help="steps of the GPT")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="sizes for testing the benchmark itself")
    add_common_arguments(parser)
    options = parser.parse_args(argv)
    if unknown := set(options.variants.split(",")) - set(VARIANTS):
        parser.error(f"unknown variants {sorted(unknown)}; known: {', '.join(VARIANTS)}")
    quiet()
    report = Report("quality", ("task", "seeds", "mean", "worse than fp32, mean (min..max)"))
    with threads(options.threads):
        for name in options.task.split(","):
            measure(report, name, options)
    return report.finish(options)


if __name__ == "__main__":
    raise SystemExit(main())
