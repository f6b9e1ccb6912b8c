"""Strategies for ``lightning.pytorch``; :mod:`lightning_eff.pytorch_lightning` has those of the other package.

The classes are made from Lightning-free mixins when they are first asked for. Strings (``strategy="dropcompute"``) need
no import from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_eff.integration.namespaces import class_getter, public_classes

# ---- written by tests/faces.py from the rows of the methods
if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy

    from lightning_eff.strategies.dropcompute.strategy import DropComputeMixin
    from lightning_eff.strategies.pipelined_bp.strategy import PipelinedBPMixin

    class DropComputeStrategy(DropComputeMixin, DDPStrategy):
        """Data parallelism that does not wait for stragglers: late ranks drop micro-batches."""

    class PipelinedBPStrategy(PipelinedBPMixin, DDPStrategy):
        """Pipeline parallelism without bubble: stages update at once and allow for late gradients."""


__all__ = [
    "DropComputeStrategy",
    "PipelinedBPStrategy",
]
# ---- end of what is written

_get = class_getter(__name__, "lightning.pytorch", public_classes("strategy"))


def __getattr__(name: str) -> Any:
    return _get(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
