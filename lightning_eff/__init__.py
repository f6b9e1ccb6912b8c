"""Training-efficiency methods for PyTorch Lightning: one string or one callback, nothing else changed.

Importing this package registers the strings (``Trainer(precision="luq4")``) with every Lightning that is imported,
before or after. It imports neither torch nor Lightning itself; the public names load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_eff.integration.lazy import install
from lightning_eff.methods import METHODS, MethodInfo

if TYPE_CHECKING:
    from lightning_eff.callbacks import LowPrecision
    from lightning_eff.precision import LUQPrecision

    __version__: str

__all__ = ["METHODS", "LUQPrecision", "LowPrecision", "MethodInfo", "__version__"]

_LAZY = {"LUQPrecision": "lightning_eff.precision", "LowPrecision": "lightning_eff.callbacks"}
_SUBMODULES = (
    "callbacks",
    "errors",
    "functional",
    "integration",
    "kernels",
    "optim",
    "precision",
    "pytorch_lightning",
    "strategies",
)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"lightning_eff.{name}")
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


def _version() -> str:
    metadata = importlib.import_module("importlib.metadata")
    try:
        return str(metadata.version("lightning-eff"))
    except metadata.PackageNotFoundError:  # used from a source folder that was never installed
        return "0+unknown"


install()
