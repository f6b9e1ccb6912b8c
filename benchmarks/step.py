"""Time of a whole training step as a multiple of the fp32 step: ``python -m benchmarks.step --model gpt``.

All variants live in one process and take turns; the figure is the median over rounds of the per-round ratio. Variants
with bfloat16 weights (``bf16-sr`` and the like) are compared with ``bf16-true`` of the same run as well. ``--variants
family`` compares every method with what else there is; peers (``qpytorch``, ``brevitas``, ``torchao``) need
``python -m benchmarks.peers setup`` once.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence

import torch

from benchmarks import peers
from benchmarks._measure import Step, clock_for, interleave, threads
from benchmarks._peers import UnsupportedError
from benchmarks._report import Report, Row, add_common_arguments
from benchmarks._setup import BF16_UPDATES, VARIANTS, expand, training_step
from benchmarks._stats import ratio, spread
from benchmarks._workloads import MODELS, workload

NATIVE = {"gpt": 0.55, "resnet": 0.58, "mlp": 0.62}
FP32_PRODUCTS = {"gpt": 1.20, "resnet": 1.15, "mlp": 1.40}
TARGETS: dict[tuple[str, str], dict[str, float]] = {
    ("luq4", "fp32"): NATIVE,
    ("luq4-emulated", "fp32"): FP32_PRODUCTS,
    ("fp8", "fp32"): {"gpt": 0.85, "mlp": 1.05},
    ("flexpoint16", "fp32"): {"gpt": 1.10, "mlp": 1.35},
    **{(variant, "bf16-true"): dict.fromkeys(MODELS, 1.10) for variant in BF16_UPDATES},
}
"""(variant, base) -> model -> largest accepted ratio of step times, one thread; of ``luq4`` with int8 dot products."""
DEFAULT_VARIANTS = (
    "fp32,bf16-mixed,bf16-true,bf16-sr,bf16-kahan,bf16-split,luq4,luq4-smp2,luq4-emulated,fp8,flexpoint16"
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--model", default="mlp,gpt,resnet", help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument(
        "--variants", default=DEFAULT_VARIANTS, help=f"comma-separated, of family, {', '.join(VARIANTS)}"
    )
    parser.add_argument("--threads", default="1", help="comma-separated CPU thread counts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--channels-last", action="store_true", help="model and images in that memory format")
    parser.add_argument("--tiny", action="store_true", help="sizes for testing the benchmark itself")
    add_common_arguments(parser)
    options = parser.parse_args(argv)
    if unknown := set(expand(options.variants)) - set(VARIANTS):
        parser.error(f"unknown variants {sorted(unknown)}; known: family, {', '.join(VARIANTS)}")
    return options


def prepare(report: Report, model: str, options: argparse.Namespace) -> tuple[dict[str, Step], int]:
    """Return variant -> training step, with what others are compared with first, and the number of steps per timing."""
    wanted = expand(options.variants)
    bases = ["fp32", *(["bf16-true"] if BF16_UPDATES.keys() & set(wanted) else [])]
    steps, inner = {}, 1
    for variant in dict.fromkeys([*bases, *wanted]):
        work = workload(model, device=options.device, tiny=options.tiny)
        work = work.in_channels_last() if options.channels_last else work
        try:
            steps[variant], inner = training_step(variant, work), work.inner
        except UnsupportedError as error:
            report.note(f"{variant} on {model}: n/a, {error}")
    return steps, inner


def _peak_bytes(steps: dict[str, Step]) -> dict[str, int]:
    """Return peak CUDA memory of one step of each variant, above what is held between steps."""
    peaks = {}
    for name, step in steps.items():
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks[name] = torch.cuda.max_memory_allocated() - held
    return peaks


def measure(report: Report, model: str, num_threads: int, options: argparse.Namespace) -> None:
    """Time one model on one thread count and add a row per compared pair."""
    with threads(num_threads):
        steps, inner = prepare(report, model, options)
        clock = clock_for(options.device, num_threads)
        times = interleave(steps, rounds=options.rounds, inner=inner, clock=clock)
        peaks = _peak_bytes(steps) if options.device == "cuda" else {}
    for variant, seconds in times.items():
        details = {"step_ms": spread([1000 * s for s in seconds]).__dict__, "clock": clock, "inner": inner}
        if peaks:
            details["peak_bytes"] = peaks[variant]
        aimed = options.device == "cpu" and num_threads <= 2 and not options.tiny
        settings: dict[str, str | int] = {"model": model, "threads": num_threads, "clock": clock}
        settings["step ms"] = f"{spread(seconds).median * 1000:.1f}"
        for base in ("fp32", "bf16-true") if variant in BF16_UPDATES else ("fp32",):
            target = TARGETS.get((variant, base), {}).get(model) if aimed else None
            report.add(
                Row(settings, f"{variant} / {base}", ratio(seconds, times[base]), target=target, details=details)
            )
    gc.collect()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    options = parse(argv)
    peers.enter("benchmarks.step", expand(options.variants))
    report = Report("step", ("model", "threads", "clock", "step ms"))
    for model in options.model.split(","):
        for count in options.threads.split(","):
            measure(report, model, int(count), options)
    return report.finish(options)


if __name__ == "__main__":
    raise SystemExit(main())
