"""From the name of a variant to a function that makes one training step: forward, backward, optimiser."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from benchmarks import _peers
from benchmarks._measure import Step
from benchmarks._workloads import Workload

__all__ = ["LUQ_VARIANTS", "VARIANTS", "autocast", "convert", "training_step"]

LUQ_VARIANTS: dict[str, dict[str, Any]] = {
    "luq4": {},
    "luq4-smp2": {"samples": 2},
    "luq4-hindsight": {"hindsight": 0.1},
    "luq4-emulated": {"products": "emulated"},
    "luq4-fallback": {"products": "emulated"},
}
"""Variant -> options of ``LUQConfig``.

``luq4-emulated`` multiplies in fp32 what ``luq4`` multiplies in int8. ``luq4-fallback`` moreover runs without the
compiled kernels: plain torch, as on a machine without a C++ compiler.
"""

VARIANTS = ("fp32", "bf16-mixed", *LUQ_VARIANTS, "luq4+bf16-mixed", "fp8", "fp8+bf16-mixed", "qpytorch", "brevitas")


def convert(work: Workload, method: str = "luq4", **options: Any) -> Any:
    """Convert the workload's layers in place to the format of ``method`` and return the library's ``Conversion``."""
    from lightning_eff.precision.config import FP8Config, LUQConfig
    from lightning_eff.precision.convert import convert as convert_layers

    make = {"luq4": LUQConfig, "fp8": FP8Config}[method]
    return convert_layers(work.model, make(exempt_first_last=work.exempt_first_last, **options))


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


def training_step(variant: str, work: Workload) -> Step:
    """Prepare ``work`` for ``variant`` and return its training step with SGD, momentum 0.9.

    Raises:
        KeyError: the variant is not one of :data:`VARIANTS`.
    """
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    if variant.endswith("bf16-mixed"):
        context = autocast(work.x.device.type)
    if variant.startswith("luq4"):
        convert(work, **LUQ_VARIANTS[variant.partition("+")[0]])
    elif variant.startswith("fp8"):
        convert(work, "fp8")
    elif variant == "brevitas":
        _peers.brevitas(work)
    elif variant not in VARIANTS:
        raise KeyError(variant)
    optimizer: Any = torch.optim.SGD(work.model.parameters(), lr=1e-3, momentum=0.9)
    if variant == "qpytorch":
        optimizer = _peers.qpytorch(work, optimizer)

    around = without_kernels if variant == "luq4-fallback" else nullcontext

    def step() -> None:
        with around():
            optimizer.zero_grad()
            with context():
                loss = work.loss()
            loss.backward()
            optimizer.step()

    return step
