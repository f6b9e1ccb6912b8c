"""Strategies for ``lightning.pytorch``; :mod:`lightning_eff.pytorch_lightning` has those of the other package.

The classes are made from Lightning-free mixins when they are first asked for. Strings (``strategy="dropcompute"``) need
no import from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_eff.integration.namespaces import class_getter, public_classes

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy

    from lightning_eff.strategies.dropcompute.strategy import DropComputeMixin
    from lightning_eff.strategies.pipelined_bp.strategy import PipelinedBPMixin

    class DropComputeStrategy(DropComputeMixin, DDPStrategy):  # type: ignore[misc]
        """Data parallelism that does not wait for stragglers: a compute threshold and one weighted all-reduce."""

    class PipelinedBPStrategy(PipelinedBPMixin, DDPStrategy):  # type: ignore[misc]
        """Pipeline parallelism without bubble, late gradients compensated for."""


__all__ = ["DropComputeStrategy", "PipelinedBPStrategy"]

_get = class_getter(__name__, "lightning.pytorch", public_classes("strategy"))


def __getattr__(name: str) -> Any:
    return _get(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
