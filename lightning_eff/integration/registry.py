"""Strategy strings: our strategies in Lightning's own registry."""

from __future__ import annotations

import sys

from lightning_eff.integration.namespaces import Namespace, base_class, make_class
from lightning_eff.methods import METHODS

__all__ = ["register_strategies"]


def register_strategies(namespace: Namespace) -> None:
    """Make ``Trainer(strategy="dropcompute")`` known to one namespace; Fabric has no strategies of ours."""
    if namespace.entry_class != "Trainer":
        return
    registry = sys.modules[f"{namespace.root}.strategies"].StrategyRegistry
    for info in METHODS.values():
        if info.kind == "strategy" and info.name not in registry.available_strategies():
            made = make_class(info.load_mixin(), base_class(namespace.root, "strategy"))
            registry.register(info.name, made, description=info.summary)
