"""Bytes kept for the backward pass as a multiple of fp32: ``python -m benchmarks.memory``.

Counted from outside by ``torch.autograd.graph.saved_tensors_hooks``, by storage and without the parameters, once around
the layers that are quantised and once around the whole model. The second figure is what a user's peak memory follows:
activations and normalisations between the layers save tensors of their own, which 4-bit layers do not shrink. The third
adds copies of the weights (bf16 casts, int8 codes), which do not grow with the batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks._report import Report, Row, add_common_arguments
from benchmarks._setup import FAMILY, FORMATS, expand, prepare
from benchmarks._setup import VARIANTS as STEP_VARIANTS
from benchmarks._stats import Spread
from benchmarks._workloads import MODELS, workload
from benchmarks.tasks.saved import held_by_graph, record_all, record_saved

TARGET = 0.15
"""Largest accepted bytes of the quantised layers / the same layers in fp32: INT4 is 0.125, the rest is scales."""
COUNTED = {"bf16-mixed", "bf16-true", *FORMATS} - {"luq4-fallback"}
VARIANTS = tuple(variant for variant in STEP_VARIANTS if variant.partition("+")[0] in COUNTED)


@dataclass(frozen=True)
class Kept:
    """Bytes kept between forward and backward.

    Attributes:
        layers: what depends on the micro-batch, in the quantised layers.
        model: the same in the whole model.
        weights: casts and codes of weights, wherever they are referenced from.
    """

    layers: int
    model: int
    weights: int


def count(model: str, variant: str, options: argparse.Namespace) -> Kept:
    """Return what ``variant`` keeps in a step after the first, which fills caches."""
    work = workload(model, device=options.device, tiny=options.tiny)
    layers = [work.model.get_submodule(name) for name in work.converted_names()]
    work, context = prepare(work, variant)
    with context():
        work.loss().backward()
    with context(), record_saved(layers) as inside:
        work.loss().backward()
    with context(), record_all(work.model) as everything:
        held = held_by_graph(work.loss())
    parameters = {parameter.untyped_storage().data_ptr() for parameter in work.model.parameters()}
    outside_hooks = sum(size for storage, size in held.items() if storage not in {*everything.activations, *parameters})
    weights = inside.weight_bytes + outside_hooks
    return Kept(inside.activation_bytes, everything.activation_bytes - inside.weight_bytes, weights)


def wanted(variants: str) -> list[str]:
    """Return the listed variants; of ``family`` those that keep other bytes than fp32."""
    return expand(variants, family=[variant for variant in FAMILY if variant in VARIANTS])


def same(value: float) -> Spread:
    """Return a figure without spread: a count, not a timing."""
    return Spread(value, value, value)


def measure(report: Report, model: str, options: argparse.Namespace) -> None:
    """Add the rows of one model."""
    base = count(model, "fp32", options)
    for variant in wanted(options.variants):
        kept = count(model, variant, options)
        target = TARGET if variant.startswith("luq4") and not options.tiny else None
        rows = (
            ("quantised layers", kept.layers, base.layers, target),
            ("whole model", kept.model, base.model, None),
            ("whole model and weight copies", kept.model + kept.weights, base.model + base.weights, None),
        )
        for scope, size, base_size, limit in rows:
            settings: dict[str, str | int] = {"model": model, "scope": scope, **_mib(bytes=size, fp32_bytes=base_size)}
            details = {"bytes": size, "fp32_bytes": base_size}
            report.add(Row(settings, f"{variant} / fp32", same(size / base_size), target=limit, details=details))


def _mib(**sizes: int) -> dict[str, str]:
    """Return sizes as columns, in MiB."""
    return {name.replace("bytes", "MiB").replace("_", " "): f"{size / 2**20:.2f}" for name, size in sizes.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--model", default="mlp,gpt,resnet", help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument(
        "--variants", default="bf16-mixed,luq4", help=f"comma-separated, of family, {', '.join(VARIANTS)}"
    )
    parser.add_argument("--tiny", action="store_true", help="sizes for testing the benchmark itself")
    add_common_arguments(parser)
    options = parser.parse_args(argv)
    if unknown := set(wanted(options.variants)) - set(VARIANTS):
        parser.error(f"unknown variants {sorted(unknown)}; known: family, {', '.join(VARIANTS)}")
    torch.manual_seed(0)
    report = Report("memory", ("model", "scope", "MiB", "fp32 MiB"))
    for model in options.model.split(","):
        measure(report, model, options)
    return report.finish(options)


if __name__ == "__main__":
    raise SystemExit(main())
