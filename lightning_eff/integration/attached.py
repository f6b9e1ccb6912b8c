"""Which Trainer a module belongs to, asked without the error Lightning raises where there is none."""

from __future__ import annotations

from typing import Any

__all__ = ["trainer_of"]


def trainer_of(module: object) -> Any | None:
    """Return the Trainer a LightningModule is attached to; None before a run, with Fabric and for plain modules."""
    return getattr(module, "_trainer", None)
