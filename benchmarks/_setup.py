"""From the name of a variant to a function that makes one training step: forward, backward, optimiser."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from benchmarks import _peers
from benchmarks._measure import Step
from benchmarks._workloads import Workload
from lightning_eff.methods import METHODS

__all__ = [
    "BF16_UPDATES",
    "FAMILY",
    "FORMATS",
    "LUQ_VARIANTS",
    "VARIANTS",
    "convert",
    "expand",
    "layer_options",
    "prepare",
    "training_step",
]

LUQ_VARIANTS: dict[str, dict[str, Any]] = {
    "luq4-smp2": {"samples": 2},
    "luq4-hindsight": {"hindsight": 0.1},
    "luq4-emulated": {"products": "emulated"},
    "luq4-fallback": {"products": "emulated"},
}
"""Variant -> options of ``luq4``.

``luq4-emulated`` multiplies in fp32 what ``luq4`` multiplies in int8. ``luq4-fallback`` moreover runs without the
compiled kernels: plain torch, as on a machine without a C++ compiler.
"""

_PRECISIONS = [info for info in METHODS.values() if info.kind == "precision"]
BF16_UPDATES: dict[str, Any] = {info.name: info.options["update"] for info in _PRECISIONS if "update" in info.options}
"""Variant with bfloat16 weights -> ``update`` of ``lightning_eff.optim.bf16_updates``."""

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    **{info.name: (info.name, dict(info.options)) for info in _PRECISIONS if info.name not in BF16_UPDATES},
    **{variant: ("luq4", options) for variant, options in LUQ_VARIANTS.items()},
}
"""Variant with converted layers -> method and its options. Each also exists with ``+bf16-mixed``."""

VARIANTS = (
    *("fp32", "bf16-mixed", "bf16-true", *BF16_UPDATES),
    *(f"{name}{base}" for base in ("", "+bf16-mixed") for name in FORMATS),
    *_peers.PEERS,
)
FAMILY = (
    *("fp32", "bf16-mixed", "bf16-true", *BF16_UPDATES, *(name for name in FORMATS if name not in LUQ_VARIANTS)),
    *_peers.PEERS,
)
"""The comparison of every method with what else there is; ``--variants family``."""


def expand(variants: str, *, family: Iterable[str] = FAMILY) -> list[str]:
    """Return the variants of a comma-separated list, in which the word ``family`` stands for several.

    Example:
        >>> expand("luq4,family", family=["fp32", "luq4", "fp8"])
        ['luq4', 'fp32', 'fp8']
    """
    names = [name for given in variants.split(",") for name in (family if given == "family" else (given,))]
    return list(dict.fromkeys(names))


def convert(work: Workload, variant: str = "luq4", **options: Any) -> Any:
    """Convert the workload's layers in place to a format of :data:`FORMATS` and return the library's ``Conversion``.

    The same layers for every format: none is left out because it is small.
    """
    from lightning_eff.precision.layers.convert import convert as convert_layers

    return convert_layers(
        work.model, layer_options(variant, **{"exempt_first_last": work.exempt_first_last, **options})
    )


def layer_options(variant: str, **options: Any) -> Any:
    """Return the options of a format of :data:`FORMATS`, which leaves out no layer because it is small."""
    method, fixed = FORMATS[variant]
    make = METHODS[method].load_mixin().options_class
    every = {"filter_slow": False} if "filter_slow" in make.RULES else {}
    return make(**{**every, **fixed, **options})


def autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return the context Lightning runs ``precision="bf16-mixed"`` in."""
    from lightning.fabric.plugins import MixedPrecision

    return MixedPrecision("bf16-mixed", device).forward_context


@contextmanager
def without_kernels() -> Iterator[None]:
    """Run the block as on a machine that cannot compile; both switches are paid for inside the block."""
    from lightning_eff.kernels.build import library

    before = os.environ.get("LIGHTNING_EFF_KERNELS")
    os.environ["LIGHTNING_EFF_KERNELS"] = "0"
    library.cache_clear()
    try:
        yield
    finally:
        os.environ.pop("LIGHTNING_EFF_KERNELS")
        if before is not None:
            os.environ["LIGHTNING_EFF_KERNELS"] = before
        library.cache_clear()
        library()


def prepare(work: Workload, variant: str) -> tuple[Workload, Callable[[], AbstractContextManager[Any]]]:
    """Bring a workload into the number format of ``variant``: return it, and the context of its forward pass.

    Raises:
        KeyError: the variant is not one of :data:`VARIANTS`.
        UnsupportedError: a peer has nothing to convert in this model.
    """
    method, _, base = variant.partition("+")
    if variant not in VARIANTS:
        raise KeyError(variant)
    if method in FORMATS:
        convert(work, method)
    elif method == "bf16-true" or method in BF16_UPDATES:
        work = work.in_bf16()
    elif method in _peers.CONVERT:
        _peers.CONVERT[method](work)
    context = autocast(work.x.device.type) if "bf16-mixed" in (method, base) else nullcontext
    return work, context


def training_step(variant: str, work: Workload) -> Step:
    """Prepare ``work`` for ``variant`` and return its training step with SGD, momentum 0.9. Raises as it does."""
    work, context = prepare(work, variant)
    optimizer: Any = torch.optim.SGD(work.model.parameters(), lr=1e-3, momentum=0.9)
    if variant == "qpytorch":
        optimizer = _peers.qpytorch(work, optimizer)
    elif variant in BF16_UPDATES:
        from lightning_eff.optim import bf16_updates

        bf16_updates(optimizer, update=BF16_UPDATES[variant])

    around = without_kernels if variant.startswith("luq4-fallback") else nullcontext

    def step() -> None:
        with around():
            optimizer.zero_grad()
            with context():
                loss = work.loss()
            loss.backward()
            optimizer.step()

    return step
