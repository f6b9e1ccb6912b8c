"""Runs of strategy="dropcompute" whose every micro-batch is planned, and what they have to give."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tests.strategies.models import BATCH, data, loss_of, net, parameters_of

M, STEPS = 4, 6


SAMPLES = 2 * BATCH * M * STEPS


PLAN = [[4, 1, 3, 2, 4, 1], [2, 4, 1, 4, 4, 3]]
"""Micro-batches each rank computes in each step."""


def planned(plan: list[list[int]], **options: Any) -> Any:
    """The strategy, its clock replaced: every rank stops after as many micro-batches as ``plan`` says."""
    from lightning_eff.strategies import DropComputeStrategy

    class Planned(DropComputeStrategy):  # type: ignore[misc,valid-type]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            count = plan[self.global_rank][self._steps]
            self.threshold_s = math.inf if self._window.offered < count else -1.0
            try:
                return super().training_step(*args, **kwargs)
            finally:
                self.threshold_s = 1.0  # what is saved; no run could have the other

    return Planned(threshold=1.0, process_group_backend="gloo", **options)


def reference(
    plan: list[list[int]], *, normalize: str = "computed", clip: float | None = None, samples: int = SAMPLES
) -> Tensor:
    """The weighted mean of the planned micro-batches, computed in one process."""
    model = net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
    batches = data(samples).double().split(BATCH)
    for step in range(math.ceil(len(batches) / 2 / M)):
        optimizer.zero_grad()
        window = len(batches[2 * step * M : 2 * (step + 1) * M]) // 2
        counts = [min(plan[rank][step], window) for rank in range(2)]
        for rank in range(2):
            for m in range(counts[rank]):
                loss_of(model, batches[rank::2][step * M + m]).backward()
        divisor = {"computed": sum(counts) * M / window, "maximum": 2 * M}[normalize]
        for p in model.parameters():
            p.grad = p.grad / divisor
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
    return parameters_of(model)
