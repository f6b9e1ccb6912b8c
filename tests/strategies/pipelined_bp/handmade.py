"""Mitigations, optimizers and stages of one parameter each, made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_eff.strategies.pipelined_bp.mitigation import Mitigation, parse_mitigation
from lightning_eff.strategies.pipelined_bp.weights import Stage, Weights

CPU = torch.device("cpu")


def parsed(text: str = "lwp+sc", horizon: Any = None, gamma: Any = 0.9, stash: bool = False) -> Mitigation:
    return parse_mitigation(text, horizon=horizon, gamma=gamma, stash=stash)


def optimizer(kind: Callable[..., Any], **options: Any) -> Any:
    return kind([nn.Parameter(torch.ones(2))], lr=0.1, **options)


SGD, ADAM, RMS = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop


class HandMade:
    """Stages of one parameter each, whose value is the number of updates it has had: a version is seen as a number."""

    def __init__(self, stages: int = 3, in_flight: int = 2, mitigation: str = "none") -> None:
        self.parameters = [nn.Parameter(torch.zeros(1)) for _ in range(stages)]
        made = [Stage(s, stages, in_flight, [p]) for s, p in enumerate(self.parameters)]
        self.weights = Weights(made, parsed(mitigation), SGD(self.parameters, lr=1.0, momentum=0.9))

    def forward(self) -> list[float]:
        self.weights.before_forward()
        return self._seen()

    def backward(self) -> list[float]:
        self.weights.before_backward()
        return self._seen()

    def _seen(self) -> list[float]:
        seen = [p.item() for p in self.parameters]
        self.weights.after_pass()
        assert [p.item() for p in self.parameters] == [self.weights.updates] * len(seen), "the true ones are back"
        return seen

    def update(self, *, skipped: bool = False) -> None:
        def step() -> None:
            for p in self.parameters:
                p.data += 1

        if not skipped:
            self.weights.update(step)
            return
        self.weights.skip_update()
        for p in self.parameters:  # only that versions can be told apart
            p.data += 1
