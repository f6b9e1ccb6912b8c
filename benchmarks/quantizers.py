"""Time of the quantiser kernels as multiples of a copy of the same tensor: ``python -m benchmarks.quantizers``.

A copy reads and writes every byte once, so the figure says how far a quantiser is from the memory's limit. ``fast`` is
``lightning_eff.kernels``, ``naive`` the plain torch of ``lightning_eff.functional``; both also measure the statistics
(the maximum, the SAWB sums) unless a row says otherwise.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks._measure import Step, clock_for, interleave, threads
from benchmarks._report import Report, Row, add_common_arguments
from benchmarks._stats import ratio, spread

TARGETS = {1_048_576: 3.5, 4_194_304: 2.0}
"""Elements -> largest accepted multiple of a copy, one thread (4 MiB and 16 MiB of fp32)."""
PEER_TARGET = 1 / 30
ENOUGH_S = 0.03  # one timing lasts at least this long, whatever the size
IMPLEMENTATIONS = ("fast", "naive", "qpytorch")


def candidates(implementation: str, x: Tensor) -> dict[str, Step]:
    """Return kernel -> call, for one implementation and one tensor."""
    if implementation == "qpytorch":
        from qtorch.quant import float_quantize

        return {"e4m3 stochastic": lambda: float_quantize(x, exp=4, man=3, rounding="stochastic")}
    if implementation == "naive":
        from lightning_eff import functional as module
    else:
        from lightning_eff import kernels as module  # type: ignore[no-redef]
    positive, largest = x.relu(), x.abs().max()
    calls: dict[str, Step] = {
        "luq_codes": lambda: module.luq_codes(x),
        "luq_codes, maximum given": lambda: module.luq_codes(x, max_abs=largest),
        "luq_quantize": lambda: module.luq_quantize(x),
        "sawb_codes": lambda: module.sawb_codes(x),
        "sawb_codes, unsigned": lambda: module.sawb_codes(positive, unsigned="mirror5"),
    }
    return calls


def enough_calls(call: Callable[[], object]) -> int:
    """Return how many calls in a row last about :data:`ENOUGH_S`."""
    call()
    begin = time.perf_counter()
    call()
    return max(1, math.ceil(ENOUGH_S / max(time.perf_counter() - begin, 1e-7)))


def measure(report: Report, size: int, num_threads: int, options: argparse.Namespace) -> None:
    """Time every kernel on one heavy-tailed tensor of ``size`` elements."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator) * torch.exp(2 * torch.randn(size, generator=generator))
    x = x.to(options.device)
    target_tensor = torch.empty_like(x)
    steps: dict[str, Step] = {"copy": lambda: target_tensor.copy_(x)}
    for implementation in options.impl.split(","):
        for kernel, call in candidates(implementation, x).items():
            steps[f"{implementation} {kernel}"] = call
    with threads(num_threads):
        inner = {name: enough_calls(call) for name, call in steps.items()}
        clock = clock_for(options.device, num_threads)
        times = interleave(steps, rounds=options.rounds, inner=inner, clock=clock, warmup=1)
    aimed = options.device == "cpu" and num_threads == 1
    for name, seconds in times.items():
        settings: dict[str, str | int] = {"elements": size, "threads": num_threads}
        settings["ns/element"] = f"{spread(seconds).median / size * 1e9:.2f}"
        target = TARGETS.get(size) if aimed and name in ("fast luq_codes", "fast sawb_codes") else None
        report.add(Row(settings, f"{name} / copy", ratio(seconds, times["copy"]), target=target))
    _add_peer_row(report, size, num_threads, times, aimed)


def _add_peer_row(report: Report, size: int, num_threads: int, times: dict[str, list[float]], aimed: bool) -> None:
    """Compare the two stochastic 8-bit-storage quantisers directly, when both were timed."""
    ours, theirs = times.get("fast luq_codes"), times.get("qpytorch e4m3 stochastic")
    if ours is None or theirs is None:
        return
    settings: dict[str, str | int] = {"elements": size, "threads": num_threads}
    target = PEER_TARGET if aimed and size in TARGETS else None
    report.add(Row(settings, "fast luq_codes / qpytorch e4m3 stochastic", ratio(ours, theirs), target=target))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantizers", description=__doc__)
    parser.add_argument("--sizes", default="65536,1048576,4194304", help="comma-separated numbers of fp32 elements")
    parser.add_argument("--impl", default="fast,naive", help=f"comma-separated, of {', '.join(IMPLEMENTATIONS)}")
    parser.add_argument("--threads", default="1", help="comma-separated CPU thread counts")
    parser.add_argument("--rounds", type=int, default=9)
    add_common_arguments(parser)
    options = parser.parse_args(argv)
    if unknown := set(options.impl.split(",")) - set(IMPLEMENTATIONS):
        parser.error(f"unknown implementations {sorted(unknown)}; known: {', '.join(IMPLEMENTATIONS)}")
    peers.enter("benchmarks.quantizers", options.impl.split(","))
    report = Report("quantizers", ("elements", "threads", "ns/element"))
    for size in options.sizes.split(","):
        for count in options.threads.split(","):
            measure(report, int(size), int(count), options)
    return report.finish(options)


if __name__ == "__main__":
    raise SystemExit(main())
