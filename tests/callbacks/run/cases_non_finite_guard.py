"""NonFiniteGuard for the battery of callbacks."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_eff.methods import METHODS
from lightning_eff.strategies import DropComputeStrategy, PipelinedBPStrategy
from lightning_eff.testing import CallbackCase
from tests.callbacks.refusals import SHARDED, lightnings, under

NAME = "non_finite_guard"


def _cases() -> Iterator[CallbackCase]:
    refusals = {
        **SHARDED,
        "fsdp2": lightnings("ModelParallelStrategy", _tensor_parallel_size=1),
        "dropcompute": under(DropComputeStrategy()),
        "pipelined_bp": under(PipelinedBPStrategy()),
    }
    wrong = {"on_nonfinite": "ignore", "max_skipped_steps": 0}
    yield CallbackCase(
        info=METHODS[NAME],
        variant="raise",
        changes=False,  # while everything is finite
        unlogged={f"eff/{NAME}/skipped": "nothing is skipped"},
        refusals=refusals,
        wrong=wrong,
    )
    yield CallbackCase(
        info=METHODS[NAME],
        variant="skip",
        options={"on_nonfinite": "skip"},
        neutral={"on_nonfinite": "warn"},
        task_options={"spoil": "loss", "spoil_at": (2, 3, 7)},
        refusals=refusals,
        wrong=wrong,
    )


CASES = tuple(_cases()) if NAME in METHODS else ()
