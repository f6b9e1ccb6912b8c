"""pipelined_bp for the battery of strategies."""

from __future__ import annotations

from typing import Any

from lightning_eff.methods import METHODS
from lightning_eff.testing import Provocation, StrategyCase
from lightning_eff.testing.tasks import fp16_scaler

PLANS: dict[str, dict[str, Any]] = {
    "lwp+sc": {"mitigation": "lwp+sc"},
    "stash": {"mitigation": "none", "stash": True},
}

CASES = tuple(
    StrategyCase(
        info=METHODS["pipelined_bp"],
        variant=name,
        always={"process_group_backend": "gloo", "schedule_picture": False},
        options={"stages": ["net.3"], **options},
        neutral={"stages": 1, **options},
        neutral_ranks=1,
        same_data=True,
        emulated=True,
        task_options={"randomness": "torch"},  # every stage has streams of its own, which the strategy restores
        refusals={
            "manual_optimization": Provocation(task={"manual": True}),
            "accumulate_grad_batches": Provocation(trainer={"accumulate_grad_batches": 2}),
            "16-mixed": Provocation(trainer={"plugins": fp16_scaler}),
        },
        wrong={"stages": 0, "mitigation": "magic", "in_flight": 0, "horizon": -1.0},
    )
    for name, options in PLANS.items()
)
