"""Run every benchmark with small settings: ``python -m benchmarks [--check] [--tiny]``; about 20 minutes on two cores.

Each is also a command of its own with more to set: ``python -m benchmarks.step --help`` and so on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from benchmarks import (
    compile_time,
    dropcompute,
    dropcompute_quality,
    memory,
    peers,
    pipelined_bp,
    pipelined_bp_quality,
    quality,
    quantizers,
    step,
)
from benchmarks._report import RESULTS


def plan(*, tiny: bool, with_peers: bool) -> list[tuple[Callable[[Sequence[str]], int], list[str]]]:
    """Return (benchmark, arguments) in the order they run."""
    if tiny:
        return [
            (quantizers.main, ["--sizes", "4096", "--rounds", "1"]),
            (step.main, ["--rounds", "1", "--tiny"]),
            (memory.main, ["--tiny"]),
            (compile_time.main, ["--rounds", "1", "--tiny"]),
            (quality.main, ["--seeds", "1", "--tiny"]),
            (dropcompute.main, ["--rounds", "1", "--noise", "stall", "--tiny"]),
            (dropcompute_quality.main, ["--seeds", "1", "--tiny"]),
            (pipelined_bp.main, ["--rounds", "1", "--tiny"]),
            (pipelined_bp_quality.main, ["--micro-batches", "4,32", "--variants", "lwp+sc", "--seeds", "1", "--tiny"]),
        ]
    variants = step.DEFAULT_VARIANTS + (",qpytorch,brevitas,torchao" if with_peers else "")
    implementations = "fast,naive" + (",qpytorch" if with_peers else "")
    return [
        (quantizers.main, ["--impl", implementations, "--rounds", "5"]),
        (step.main, ["--variants", variants, "--rounds", "5"]),
        (memory.main, []),
        (compile_time.main, ["--rounds", "1"]),
        (quality.main, ["--seeds", "2", "--steps", "150"]),
        (dropcompute.main, ["--rounds", "3"]),
        (dropcompute_quality.main, ["--seeds", "1"]),
        (pipelined_bp.main, ["--rounds", "3"]),
        (pipelined_bp_quality.main, ["--micro-batches", "4,32", "--seeds", "1"]),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run all and return 1 when a target was missed under ``--check``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with status 1 when a target is missed")
    parser.add_argument("--results", default=str(RESULTS), help="folder for the JSON files")
    parser.add_argument("--tiny", action="store_true", help="sizes for testing the benchmarks themselves")
    options = parser.parse_args(argv)
    with_peers = not options.tiny and peers.python() is not None
    if with_peers:  # peers and ours belong in one process: the whole run moves to where both are installed
        peers.enter("benchmarks", peers.MODULES)
    elif not options.tiny:
        print(f"The libraries we compare with are not installed; `{peers.HOW}` adds them to this run.")
    shared = ["--results", options.results, *(["--check"] if options.check else [])]
    return max(
        [benchmark([*arguments, *shared]) for benchmark, arguments in plan(tiny=options.tiny, with_peers=with_peers)]
    )


if __name__ == "__main__":
    raise SystemExit(main())
