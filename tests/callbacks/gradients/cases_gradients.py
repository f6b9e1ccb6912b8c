"""The callbacks that look at gradients, for the battery of callbacks."""

from __future__ import annotations

from lightning_eff.methods import METHODS
from lightning_eff.testing import CallbackCase, Provocation
from lightning_eff.testing.tasks import fp16_scaler
from tests.callbacks.refusals import SHARDED

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
