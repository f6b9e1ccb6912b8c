"""Training-efficiency methods for PyTorch Lightning: one string or one callback, nothing else changed.

Importing this package registers the strings (``Trainer(precision="luq4")``) with every Lightning that is imported,
before or after. It imports neither torch nor Lightning itself; the public names load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_eff.integration.lazy import install
from lightning_eff.methods import METHODS, MethodInfo

# ---- written by tests/faces.py from the rows of the methods
if TYPE_CHECKING:
    from lightning_eff.callbacks import GradientPruning, GradientStatistics, LowPrecision, LUQFineTuning, NonFiniteGuard
    from lightning_eff.optim import bf16_updates
    from lightning_eff.precision import (
        BF16EmulatedPrecision,
        BF16Precision,
        DFP16Precision,
        FittedPrecision,
        FlexpointPrecision,
        FP8Precision,
        LUQPrecision,
    )
    from lightning_eff.strategies import DropComputeStrategy, PipelinedBPStrategy

    __version__: str

__all__ = [
    "METHODS",
    "BF16EmulatedPrecision",
    "BF16Precision",
    "DFP16Precision",
    "DropComputeStrategy",
    "FP8Precision",
    "FittedPrecision",
    "FlexpointPrecision",
    "GradientPruning",
    "GradientStatistics",
    "LUQFineTuning",
    "LUQPrecision",
    "LowPrecision",
    "MethodInfo",
    "NonFiniteGuard",
    "PipelinedBPStrategy",
    "__version__",
    "bf16_updates",
]

_FUNCTIONS = {
    "bf16_updates": "lightning_eff.optim",
}
# ---- end of what is written

_CLASSES = {info.class_name: info.module for info in METHODS.values()}


def _submodules() -> set[str]:
    """Return the public modules of this package."""
    found = importlib.import_module("pkgutil").iter_modules(__path__)
    return {module.name for module in found if not module.name.startswith("_")}


def __getattr__(name: str) -> Any:
    home = _CLASSES.get(name) or _FUNCTIONS.get(name)
    if home is not None:
        return getattr(importlib.import_module(home), name)
    if name == "__version__":
        return _version()
    if name in _submodules():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_submodules()})


def _version() -> str:
    metadata = importlib.import_module("importlib.metadata")
    try:
        return str(metadata.version("lightning-eff"))
    except metadata.PackageNotFoundError:  # used from a source folder that was never installed
        return "0+unknown"


install()
