"""Time until the first training step is done, cold and warm: ``python -m benchmarks.compile_time``.

Cold: the kernels are compiled into an empty cache directory (``LIGHTNING_EFF_CACHE``). Warm: a second interpreter finds
them there. Each runs in an interpreter of its own; wall time, because the compiler is another process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks._report import Report, Row, add_common_arguments
from benchmarks._stats import Spread, ratio, spread
from benchmarks._workloads import MODELS

ROOT = Path(__file__).resolve().parents[1]


def first_step(model: str, variant: str, cache: str, *, tiny: bool) -> dict[str, float]:
    """Run one interpreter that takes two steps and return its timings, in seconds."""
    command = [sys.executable, "-m", "benchmarks._first_step", model, variant, "tiny" if tiny else "full"]
    environment = {**os.environ, "LIGHTNING_EFF_CACHE": cache}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    timings: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return timings


def measure(report: Report, model: str, options: argparse.Namespace) -> None:
    """Add the cold, warm and fp32 first step of one model."""
    cold, warm, plain = [], [], []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(first_step(model, "luq4", cache, tiny=options.tiny))
            warm.append(first_step(model, "luq4", cache, tiny=options.tiny))
            plain.append(first_step(model, "fp32", cache, tiny=options.tiny))

    def row(pair: str, value: Spread, unit: str = "s") -> None:
        report.add(Row({"model": model}, pair, value, unit))

    for key, label in (("import_s", "import"), ("first_step_s", "first step"), ("second_step_s", "second step")):
        for name, runs in (("luq4 cold", cold), ("luq4 warm", warm), ("fp32", plain)):
            row(f"{name}, {label}", spread([run[key] for run in runs]))
    cold_s, warm_s = [run["first_step_s"] for run in cold], [run["first_step_s"] for run in warm]
    row("first step, cold / warm", ratio(cold_s, warm_s), unit="")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=__doc__)
    parser.add_argument("--model", default="mlp", help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="sizes for testing the benchmark itself")
    add_common_arguments(parser)
    options = parser.parse_args(argv)
    report = Report("compile_time", ("model",))
    for model in options.model.split(","):
        measure(report, model, options)
    return report.finish(options)


if __name__ == "__main__":
    raise SystemExit(main())
