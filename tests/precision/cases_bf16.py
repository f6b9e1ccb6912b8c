"""The precision plugins that keep bfloat16 weights, for their battery."""

from __future__ import annotations

from lightning_eff.methods import METHODS
from lightning_eff.testing import PrecisionCase
from tests.precision.refusals import refusals

CASES = tuple(
    PrecisionCase(
        info=METHODS[name],
        steps=12,
        state=(),  # it is part of the optimizer's
        no_way_back="plain Lightning hands on what the optimizer kept for the method, which refuses it by name",
        wrong={"update": "rounded"},
        refusals=refusals(METHODS[name]),
    )
    for name in ("bf16-sr", "bf16-kahan", "bf16-split")
)
