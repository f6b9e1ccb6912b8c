"""One broken element of a gradient, wherever it is, stops the step before any parameter has changed: every format."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff.errors import NonFiniteGradientError
from lightning_eff.methods import METHODS
from lightning_eff.precision.formats import fp8
from lightning_eff.precision.gradients import broken_names
from lightning_eff.precision.plugin import QuantizedPrecisionMixin
from tests.precision.models import loader, parameters_of, task, trainer

PRECISIONS = [info for info in METHODS.values() if info.kind == "precision"]
FORMATS = [info.name for info in PRECISIONS if issubclass(info.load_mixin(), QuantizedPrecisionMixin)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("name", "place"), [("net.2.weight", 301), ("net.2.bias", -1), ("net.6.weight", 7)])
@pytest.mark.parametrize("precision", FORMATS)
def test_one_element_stops_the_step(
    monkeypatch: pytest.MonkeyPatch, precision: str, name: str, place: int, value: float
) -> None:
    def on_after_backward(self: Any) -> None:
        if self.global_step == 1:
            self.before = parameters_of(self)
            self.get_parameter(name).grad.view(-1)[place] = value

    monkeypatch.setattr(fp8, "SLOW_FEATURES", 0)
    model = task(on_after_backward=on_after_backward)
    with pytest.raises(NonFiniteGradientError, match=f"optimizer step 1 .* in 1 of 8 parameters: {name}"):
        trainer(precision=precision, limit_train_batches=4).fit(model, loader())
    assert torch.equal(parameters_of(model), model.before)


def test_sums_that_overflow_are_no_alarm() -> None:
    p, q = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 3e38)
    assert broken_names([("p", p), ("q", q)]) == []
    p.grad = torch.tensor([math.inf, -math.inf, 0.0, 0.0])
    q.grad = torch.zeros(4)
    assert broken_names([("p", p), ("q", q)]) == ["p"]


def test_sparse_and_empty_gradients_are_looked_at() -> None:
    table, none = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.zeros(0))
    none.grad = torch.zeros(0)
    table(torch.tensor([1, 1, 3])).sum().backward()
    named = [("table", table.weight), ("none", none)]
    assert broken_names(named) == []
    table.weight.grad._values()[1, 1] = math.nan  # type: ignore[union-attr]
    assert broken_names(named) == ["table"]
