"""How what a precision method refuses is provoked."""

from __future__ import annotations

from typing import Any

from lightning_eff.integration.graft import check_strategy
from lightning_eff.methods import MethodInfo
from lightning_eff.testing import Provocation
from lightning_eff.testing.tasks import strategy_of

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


def refusals(info: MethodInfo) -> dict[str, Provocation]:
    """How each conflict of a row is provoked: the key is a strategy or a Lightning precision."""
    return {name: under(info, name) if name in STRATEGIES else on(info, name) for name in info.conflicts}
