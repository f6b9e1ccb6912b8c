"""How the strategies that a callback refuses are provoked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lightning_eff.testing import Provocation
from lightning_eff.testing.tasks import strategy_of


def under(strategy: Any) -> Provocation:
    """Provoke with a strategy, at the start of fit."""

    def provoke(callback: Any) -> None:
        callback.on_fit_start(SimpleNamespace(strategy=strategy, precision="32-true"), None)

    return Provocation(call=provoke)


def lightnings(name: str, **attributes: Any) -> Provocation:
    """Provoke with one of Lightning's strategies that cannot be built here."""
    return under(strategy_of("lightning.pytorch", name, **attributes))


SHARDED = {"fsdp": lightnings("FSDPStrategy"), "deepspeed": lightnings("DeepSpeedStrategy")}
