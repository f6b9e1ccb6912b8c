"""The callbacks that look at gradients, for the battery of callbacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lightning_eff.methods import METHODS
from lightning_eff.testing import CallbackCase, Provocation
from lightning_eff.testing.tasks import fp16_scaler, strategy_of


def under(name: str) -> Provocation:
    """Provoke with one of Lightning's strategies that cannot be built here."""

    def provoke(callback: Any) -> None:
        strategy = strategy_of("lightning.pytorch", name)
        callback.on_fit_start(SimpleNamespace(strategy=strategy, precision="32-true"), None)

    return Provocation(call=provoke)


SHARDED = {"fsdp": under("FSDPStrategy"), "deepspeed": under("DeepSpeedStrategy")}

CASES = (
    CallbackCase(
        info=METHODS["gradient_pruning"],
        options={"sparsity": 0.5, "warmup_steps": 2, "refit_every_n_steps": 4, "feedback": True},
        neutral={"sparsity": 0.0},
        refusals={"16-mixed": Provocation(trainer={"plugins": fp16_scaler}), **SHARDED},
        wrong={"sparsity": 1.0, "warmup_steps": -1, "refit_every_n_steps": 0, "layers": 3},
    ),
    CallbackCase(
        info=METHODS["gradient_statistics"],
        options={"every_n_steps": 3},
        neutral={"every_n_steps": 1},
        changes=False,
        refusals=SHARDED,
        wrong={"every_n_steps": 0, "bits": 1, "layers": 3},
    ),
)
