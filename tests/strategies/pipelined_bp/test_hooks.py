"""What a pipeline changes of an optimizer and its schedulers, and puts back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_eff.strategies.pipelined_bp import hooks
from tests.strategies.pipelined_bp.handmade import SGD, optimizer


def test_an_optimizers_step_is_its_schedulers_again() -> None:
    sgd = optimizer(SGD)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 0.5**step)
    wrapped, calls = sgd.step, []
    with hooks.replace_step(sgd, lambda step: calls.append("update") or step()):
        assert sgd.step(lambda: calls.append("closure") or 3) == 3
    assert calls == ["closure", "update"]
    assert sgd.step is wrapped
    schedule.step()  # it warns (an error here) unless the optimizer's own step was run before
    with pytest.raises(ArithmeticError), hooks.replace_step(sgd, lambda step: step()):
        raise ArithmeticError
    assert sgd.step is wrapped
    plain = optimizer(SGD)
    with hooks.replace_step(plain, lambda step: step()):
        assert "step" in plain.__dict__
    assert "step" not in plain.__dict__


class Model:
    """What of a LightningModule schedulers are stepped through."""

    def __init__(self) -> None:
        self.stepped: list[Any] = []

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.stepped.append((scheduler, metric))


def test_a_scheduler_waits_for_the_update_of_its_sample() -> None:
    class Count:
        samples = updates = 0

    model, count, known = Model(), Count(), []
    steps = hooks.SchedulerSteps(model, lambda: known[0] if known else None)
    assert "lr_scheduler_step" not in model.__dict__
    undo = steps.install()
    model.lr_scheduler_step("before the first batch", None)
    assert model.stepped == [("before the first batch", None)]
    known.append(count)
    for i in range(5):  # two samples late
        count.samples = i + 1
        if i >= 2:
            count.updates = i - 1
            steps.run_due()
        model.lr_scheduler_step("step", i)
        assert model.stepped[1:] == [("step", done) for done in range(count.updates)]
    count.updates = 5  # drained
    steps.run_due()
    assert model.stepped[1:] == [("step", i) for i in range(5)]
    undo()
    assert "lr_scheduler_step" not in model.__dict__
