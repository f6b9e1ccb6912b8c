"""The compute threshold of a run: it belongs to what it was measured with."""

from __future__ import annotations

import math
from typing import Any

from tests.harness import run_ranks
from tests.strategies.uses import M, new_model, new_trainer, rows


def _measurements(rank: int, world: int) -> dict[str, tuple[float, bool]]:
    """The threshold in the first micro-batch of each fit, and after the first, and whether it was measured."""
    from lightning_eff.strategies import DropComputeStrategy

    used = DropComputeStrategy(warmup_steps=6, process_group_backend="gloo")
    seen: dict[str, tuple[float, bool]] = {}

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        seen.setdefault(self.fit, (used.threshold_s, used._search.has_measured))

    trainer, model = new_trainer(used, accumulate_grad_batches=M), new_model(on_train_batch_start=on_train_batch_start)
    model.fit = "first"
    trainer.fit(model, rows())
    seen["measured"] = (used.threshold_s, used._search.has_measured)
    trainer.fit_loop.max_epochs, model.fit = 4, "longer"
    trainer.fit(model, rows())
    other = new_model(on_train_batch_start=on_train_batch_start)
    trainer.fit_loop.max_epochs, other.fit = 6, "other model"
    trainer.fit(other, rows())
    assert trainer.global_step == 36
    assert used._steps == 12, "of the other model"
    return seen


def test_a_measured_threshold_belongs_to_its_run() -> None:
    """The layers, the batches and the machine's load may be others in the next; a checkpoint brings it back."""
    (seen,) = run_ranks(_measurements, 1, init_group=False)
    assert seen["first"] == seen["longer"] == seen["other model"] == (math.inf, False)
    assert seen["measured"][1]
