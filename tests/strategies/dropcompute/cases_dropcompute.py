"""dropcompute for the battery of strategies."""

from __future__ import annotations

import math

from lightning_eff.methods import METHODS
from lightning_eff.testing import Provocation, StrategyCase

MICRO_BATCHES = 2

CASES = tuple(
    StrategyCase(
        info=METHODS["dropcompute"],
        variant=normalize,
        # A threshold of nothing drops what is above the least, whatever the clock says.
        options={"threshold": 0.0, "min_micro_batches": 1, "normalize": normalize},
        neutral={"threshold": math.inf, "normalize": normalize},
        trainer={"accumulate_grad_batches": MICRO_BATCHES},
        refusals={
            "sync_batchnorm": Provocation(trainer={"sync_batchnorm": True}),
            "manual_optimization": Provocation(trainer={"accumulate_grad_batches": 1}, task={"manual": True}),
        },
        wrong={"threshold": -1.0, "min_micro_batches": 0, "normalize": "mean", "warmup_steps": 1},
    )
    for normalize in ("computed", "maximum")
)
