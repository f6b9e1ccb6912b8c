"""From which size a single linear layer gets faster: ``python -m benchmarks.layers --variants fp8,luq4``.

Forward, backward and the weight codes' renewal of one ``nn.Linear(size, size)`` at several sizes and batch sizes
(rows), as a multiple of float32. The filters of the fp8 family (``filter_slow``) rest on these figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

from benchmarks._measure import Step, clock_for, interleave, threads
from benchmarks._report import Report, Row, add_common_arguments
from benchmarks._setup import layer_options
from benchmarks._stats import ratio, spread
from lightning_eff.precision.layers.convert import convert


def layer_step(variant: str, size: int, rows: int, device: str) -> Step:
    """One training step of a layer, without the optimizer: every call renews the weight's codes, as a step does."""
    layer = nn.Sequential(nn.Linear(size, size)).to(device)
    x = torch.randn(rows, size, device=device, requires_grad=True)
    grad = torch.randn(rows, size, device=device)
    states = []
    if variant != "fp32":
        states = list(convert(layer, layer_options(variant, exempt_first_last=False)).states.values())

    def step() -> None:
        layer[0].weight.grad = layer[0].bias.grad = x.grad = None
        layer(x).backward(grad)
        for state in states:
            state.invalidate()

    return step


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    parser.add_argument("--variants", default="fp8,fp8-rowwise,fp8-delayed,luq4", help="comma-separated methods")
    parser.add_argument("--sizes", default="32,64,128,256,512,1024", help="features in and out, comma-separated")
    parser.add_argument("--rows", default="64,512,4096", help="rows of the input, comma-separated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    add_common_arguments(parser)
    options = parser.parse_args(argv)
    report = Report("layers", ("size", "rows", "us"))
    clock = clock_for(options.device, options.threads)
    with threads(options.threads):
        for size in map(int, options.sizes.split(",")):
            for rows in map(int, options.rows.split(",")):
                names = list(dict.fromkeys(["fp32", *options.variants.split(",")]))
                steps = {name: layer_step(name, size, rows, options.device) for name in names}
                inner = max(1, 2**27 // (size * size * rows))
                times = interleave(steps, rounds=options.rounds, inner=min(inner, 200), clock=clock)
                for name, seconds in times.items():
                    settings: dict[str, str | int] = {"size": size, "rows": rows}
                    settings["us"] = f"{spread(seconds).median * 1e6:.0f}"
                    report.add(Row(settings, f"{name} / fp32", ratio(seconds, times["fp32"])))
    return report.finish(options)


if __name__ == "__main__":
    raise SystemExit(main())
