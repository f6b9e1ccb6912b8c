"""The precision plugins that convert layers, for their battery."""

from __future__ import annotations

from typing import Any

from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.precision.plugin import QuantizedPrecisionMixin
from lightning_eff.testing import PrecisionCase
from tests.precision.refusals import refusals

REMEMBERING: dict[str, dict[str, Any]] = {
    "luq4": {"hindsight": 0.5},
    "fp8-delayed": {},
    "fp8-fit": {"scale": "mean"},  # where the place is remembered too
    "fp6-fit": {"scale": "mean"},
    "flexpoint16": {},
}
SAVED_BITS = {"luq4": 4, "flexpoint16": 16, "dfp16": 16, "bf16-emulated": 16}


def case_of(info: MethodInfo) -> PrecisionCase:
    return PrecisionCase(
        info=info,
        options={"measure_every_n_steps": 2, **REMEMBERING.get(info.name, {})},
        task_options={"width": 72},
        steps=12,
        remembering=REMEMBERING.get(info.name),
        saved_bits=SAVED_BITS.get(info.name, 8),
        wrong={"exempt": "head", "on_nonfinite": "skip", "measure_every_n_steps": -1},
        refusals=refusals(info),
    )


CASES = tuple(
    case_of(info)
    for info in METHODS.values()
    if info.kind == "precision" and issubclass(info.load_mixin(), QuantizedPrecisionMixin)
)
