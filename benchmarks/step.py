"""Time of a whole training step as a multiple of the fp32 step: ``python -m benchmarks.step --model gpt``.

All variants live in one process and take turns; the figure is the median over rounds of the per-round ratio. Peers
(``qpytorch``, ``brevitas``) need ``python -m benchmarks.peers setup`` once.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence

import torch

from benchmarks import peers
from benchmarks._measure import Step, clock_for, interleave, threads
from benchmarks._report import Report, Row, add_common_arguments
from benchmarks._setup import VARIANTS, training_step
from benchmarks._stats import ratio, spread
from benchmarks._workloads import MODELS, workload

NATIVE = {"gpt": 0.55, "resnet": 0.58, "mlp": 0.62}
FP32_PRODUCTS = {"gpt": 1.20, "resnet": 1.15, "mlp": 1.40}
TARGETS = {"luq4": NATIVE, "luq4-emulated": FP32_PRODUCTS, "fp8": {"gpt": 0.85, "mlp": 1.05}}
"""Largest accepted step time / fp32 on a CPU with int8 dot products (VNNI), one thread."""
DEFAULT_VARIANTS = "fp32,bf16-mixed,luq4,luq4-smp2,luq4-emulated,fp8"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--model", default="mlp,gpt,resnet", help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument("--variants", default=DEFAULT_VARIANTS, help=f"comma-separated, of {', '.join(VARIANTS)}")
    parser.add_argument("--threads", default="1", help="comma-separated CPU thread counts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="sizes for testing the benchmark itself")
    add_common_arguments(parser)
    options = parser.parse_args(argv)
    if unknown := set(options.variants.split(",")) - set(VARIANTS):
        parser.error(f"unknown variants {sorted(unknown)}; known: {', '.join(VARIANTS)}")
    return options


def prepare(model: str, options: argparse.Namespace) -> tuple[dict[str, Step], int]:
    """Return variant -> training step, fp32 always first, and the number of steps per timing."""
    variants = dict.fromkeys(["fp32", *options.variants.split(",")])
    steps, inner = {}, 1
    for variant in variants:
        work = workload(model, device=options.device, tiny=options.tiny)
        steps[variant], inner = training_step(variant, work), work.inner
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
    """Time one model on one thread count and add a row per variant."""
    with threads(num_threads):
        steps, inner = prepare(model, options)
        clock = clock_for(options.device, num_threads)
        times = interleave(steps, rounds=options.rounds, inner=inner, clock=clock)
        peaks = _peak_bytes(steps) if options.device == "cuda" else {}
    for variant, seconds in times.items():
        details = {"step_ms": spread([1000 * s for s in seconds]).__dict__, "clock": clock, "inner": inner}
        if peaks:
            details["peak_bytes"] = peaks[variant]
        aimed = options.device == "cpu" and num_threads <= 2 and not options.tiny
        target = TARGETS.get(variant, {}).get(model) if aimed else None
        settings: dict[str, str | int] = {"model": model, "threads": num_threads, "clock": clock}
        settings["step ms"] = f"{spread(seconds).median * 1000:.1f}"
        report.add(Row(settings, f"{variant} / fp32", ratio(seconds, times["fp32"]), target=target, details=details))
    gc.collect()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    options = parse(argv)
    peers.enter("benchmarks.step", options.variants.split(","))
    report = Report("step", ("model", "threads", "clock", "step ms"))
    for model in options.model.split(","):
        for count in options.threads.split(","):
            measure(report, model, int(count), options)
    return report.finish(options)


if __name__ == "__main__":
    raise SystemExit(main())
