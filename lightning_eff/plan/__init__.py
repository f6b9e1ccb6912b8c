"""What a method will do for a run, before it is run: ``python -m lightning_eff plan METHOD ...``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from lightning_eff.errors import UnknownMethodError, nearest

PLANNERS = {"dropcompute": "lightning_eff.plan.dropcompute"}
"""Method -> the module whose ``main`` plans it."""


def main(method: str, argv: Sequence[str] | None = None) -> int:
    """Plan one method from the command line; the arguments are those of the method's planner.

    Raises:
        UnknownMethodError: there is no planner for the method; the nearest is named.
    """
    if method not in PLANNERS:
        hint = nearest(method, PLANNERS)
        raise UnknownMethodError(f"No plan for {method!r}.{hint} Known: {', '.join(PLANNERS)}.")
    return int(importlib.import_module(PLANNERS[method]).main(argv))
