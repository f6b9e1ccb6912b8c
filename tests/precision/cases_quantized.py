"""The precision plugins that convert layers, for their battery."""

from __future__ import annotations

from typing import Any

from lightning_eff.integration.graft import check_strategy
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.precision.plugin import QuantizedPrecisionMixin
from lightning_eff.testing import PrecisionCase, Provocation
from lightning_eff.testing.tasks import strategy_of

REMEMBERING: dict[str, dict[str, Any]] = {
    "luq4": {"hindsight": 0.5},
    "fp8-delayed": {},
    "fp8-fit": {"scale": "mean"},  # where the place is remembered too
    "fp6-fit": {"scale": "mean"},
    "flexpoint16": {},
}
SAVED_BITS = {"luq4": 4, "flexpoint16": 16, "dfp16": 16, "bf16-emulated": 16}
STRATEGIES = {
    "fsdp": ("lightning.pytorch", "FSDPStrategy"),
    "fsdp2": ("lightning.pytorch", "ModelParallelStrategy"),
    "model_parallel": ("lightning.pytorch", "ModelParallelStrategy"),
    "deepspeed": ("lightning.pytorch", "DeepSpeedStrategy"),
    "fabric_deepspeed": ("lightning.fabric", "DeepSpeedStrategy"),
}
"""Key of a conflict -> package and class of a strategy that cannot be built without its hardware or package."""


def under(info: MethodInfo, conflict: str) -> Provocation:
    """Provoke with a strategy."""
    attributes = {"_tensor_parallel_size": 1} if conflict == "fsdp2" else {}
    strategy = strategy_of(*STRATEGIES[conflict], **attributes)
    return Provocation(call=lambda _: check_strategy(info, strategy))


def on(info: MethodInfo, base: str) -> Provocation:
    """Provoke with a Lightning precision below the method."""

    def provoke(_: Any) -> None:
        from lightning.pytorch import Trainer

        Trainer(accelerator="cpu", devices=1, logger=False, precision=f"{info.name}+{base}")  # type: ignore[arg-type]

    return Provocation(call=provoke)


def case_of(info: MethodInfo) -> PrecisionCase:
    return PrecisionCase(
        info=info,
        options={"measure_every_n_steps": 2, **REMEMBERING.get(info.name, {})},
        task_options={"width": 72},
        steps=12,
        remembering=REMEMBERING.get(info.name),
        saved_bits=SAVED_BITS.get(info.name, 8),
        wrong={"exempt": "head", "on_nonfinite": "skip", "measure_every_n_steps": -1},
        refusals={name: under(info, name) if name in STRATEGIES else on(info, name) for name in info.conflicts},
    )


CASES = tuple(
    case_of(info)
    for info in METHODS.values()
    if info.kind == "precision" and issubclass(info.load_mixin(), QuantizedPrecisionMixin)
)
