"""Validation metric after equal steps: fp32, the methods, 4 bits with parts of LUQ removed, a control that should lose.

Run ``python -m benchmarks.quality``, or with ``--variants family`` for every method of the package. The ablations say
what each part is for: ``no-underflow`` rounds gradients below the smallest level to zero or to it, instead of keeping
them in expectation; ``no-log-rounding`` rounds all others to the nearest power of two; ``nearest`` does both (plain
biased FP4). They are compared with ``luq4-all-layers``: first and last layer are converted too, because the gradient of
the classifier has the heaviest tail. ``fp16-unscaled`` is the papers' control: float16 without loss scaling. The
gradients of these models are large enough for it; those of the task ``gpt-faint`` are not, as in the papers' models.
Small tasks, few steps: a difference here is a hint, the absence of one proves little.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

import lightning_eff  # noqa: F401 - makes the precision strings known
from benchmarks._float16 import Float16Unscaled
from benchmarks._measure import threads
from benchmarks._report import Report, Row, add_common_arguments
from benchmarks._setup import expand
from benchmarks._stats import spread
from benchmarks.tasks.compare import Task, quiet, train
from benchmarks.tasks.data import DigitsData, StdlibText
from benchmarks.tasks.modules import CharGPT, DigitsCNN
from lightning_eff import precision
from lightning_eff.methods import METHODS
from lightning_eff.precision.formats import fp8

LUQ_OPTIONS: dict[str, dict[str, Any]] = {
    "luq4-smp2": {"samples": 2},
    "luq4-levels8": {"levels": 8},
    "luq4-hindsight": {"hindsight": 0.1},
    "luq4-all-layers": {"exempt_first_last": False},
    "luq4-no-underflow": {"exempt_first_last": False, "gradient_rounding": "no_underflow"},
    "luq4-no-log-rounding": {"exempt_first_last": False, "gradient_rounding": "no_log_rounding"},
    "luq4-nearest": {"exempt_first_last": False, "gradient_rounding": "nearest"},
}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("LUQPrecision", options) for name, options in LUQ_OPTIONS.items()},
    "fp8-fit-mean": ("FittedPrecision", {"bits": 8, "scale": "mean"}),
    "fp6-fit-mean": ("FittedPrecision", {"bits": 6, "scale": "mean"}),
    "fp6-fit-stochastic": ("FittedPrecision", {"bits": 6, "gradient_rounding": "stochastic"}),
    "flexpoint16-weights": ("FlexpointPrecision", {"weights": "flex16"}),
    "flexpoint16-weights-stochastic": ("FlexpointPrecision", {"weights": "flex16", "weight_rounding": "stochastic"}),
}
"""Variant -> class in ``lightning_eff.precision`` and its options."""
FINE_TUNED = "luq4-fine-tuned"
"""``luq4`` whose last ``--steps`` / 5 steps run with INT4 weights alone, peaking at the GPT's learning rate."""
FP16_UNSCALED = "fp16-unscaled"
PRECISIONS = {
    "fp32": "32-true",
    **{name: name for name in ("bf16-mixed", "bf16-true")},
    **{name: name for name, info in METHODS.items() if info.kind == "precision"},
}
"""Variant -> ``Trainer(precision=...)``: every precision of this package, and Lightning's own beside it."""
LABELS = {FP16_UNSCALED: "fp16-unscaled (float16 without loss scaling, emulated: a control)"}
"""Variant -> what its row is called, where the name alone would not do."""
VARIANTS = tuple(dict.fromkeys([*PRECISIONS, *OPTIONS, FINE_TUNED, FP16_UNSCALED]))
FAMILY = (*PRECISIONS, FP16_UNSCALED)
DEFAULT_VARIANTS = ",".join(["fp32", "fp8", "luq4", *LUQ_OPTIONS, FINE_TUNED])


def arguments(variant: str, steps: int) -> dict[str, Any]:
    """Return the Trainer arguments of one variant for a run of ``steps`` optimizer steps."""
    if variant == FINE_TUNED:
        from lightning_eff.callbacks import LUQFineTuning

        return {"precision": "luq4", "callbacks": [LUQFineTuning(max(steps // 5, 1), base_lr=1e-3)]}
    if variant == FP16_UNSCALED:
        return {"precision": "32-true", "callbacks": [Float16Unscaled()]}
    if variant in PRECISIONS:
        return {"precision": PRECISIONS[variant]}
    name, chosen = OPTIONS[variant]
    return {"plugins": [getattr(precision, name)(**chosen)]}


def digits(options: argparse.Namespace) -> Task:
    """Return the CNN task; its metric is accuracy."""
    width, epochs = (8, 1) if options.tiny else (32, options.epochs)
    return Task("digits", "val_accuracy", lambda _seed: (DigitsCNN(width), DigitsData()), epochs)


def gpt(options: argparse.Namespace, model: type[CharGPT] = CharGPT, name: str = "gpt") -> Task:
    """Return the GPT task; its metric is bits per character."""
    width, context, steps = (16, 16, 3) if options.tiny else (128, 64, options.steps)

    def build(seed: int) -> tuple[CharGPT, StdlibText]:
        windows = 8 if options.tiny else 256
        return model(width, 2, 4, context), StdlibText(context, steps=steps, seed=seed, validation_windows=windows)

    return Task(name, "val_bits_per_char", build)


class FaintGPT(CharGPT):
    """The same model, its loss and with it every gradient 2^-12 times as large; Adam makes the same steps of them."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy per character, in units of 4096 nats."""
        return super().training_step(batch, batch_idx) * 2.0**-12


TASKS: dict[str, tuple[Callable[[argparse.Namespace], Task], float, str, int]] = {
    "digits": (digits, 100.0, "% accuracy", -1),
    "gpt": (gpt, 1.0, "bits/char", 1),
    "gpt-faint": (lambda options: gpt(options, FaintGPT, "gpt-faint"), 1.0, "bits/char", 1),
}
"""Name -> (task, factor into the unit, unit, sign that makes a positive difference a worse one)."""


@contextmanager
def small_layers_too(tiny: bool) -> Iterator[None]:
    """Convert layers of eight channels as well, where the models have no others."""
    before = fp8.SLOW_FEATURES, fp8.SLOW_CHANNELS
    if tiny:
        fp8.SLOW_FEATURES = fp8.SLOW_CHANNELS = 0
    try:
        yield
    finally:
        fp8.SLOW_FEATURES, fp8.SLOW_CHANNELS = before


def measure(report: Report, name: str, options: argparse.Namespace) -> None:
    """Train every variant with every seed, seeds outermost, and add a row per variant."""
    make, factor, unit, sign = TASKS[name]
    task, variants = make(options), list(dict.fromkeys(["fp32", *expand(options.variants, family=FAMILY)]))
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
        report.add(Row(settings, LABELS.get(variant, variant), spread(values), unit=unit, details=details))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--task", default="digits,gpt", help=f"comma-separated, of {', '.join(TASKS)}")
    known = f"family, {', '.join(VARIANTS)}"
    parser.add_argument("--variants", default=DEFAULT_VARIANTS, help=f"comma-separated, of {known}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12, help="passes over the digits")
    parser.add_argument("--steps", type=int, default=400, help="steps of the GPT")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="sizes for testing the benchmark itself")
    add_common_arguments(parser)
    options = parser.parse_args(argv)
    if unknown := set(expand(options.variants, family=FAMILY)) - set(VARIANTS):
        parser.error(f"unknown variants {sorted(unknown)}; known: {known}")
    quiet()
    report = Report("quality", ("task", "seeds", "mean", "worse than fp32, mean (min..max)"))
    with threads(options.threads), small_layers_too(options.tiny):
        for name in options.task.split(","):
            measure(report, name, options)
    return report.finish(options)


if __name__ == "__main__":
    raise SystemExit(main())
