"""Pipelined backpropagation written out: a plain loop that keeps every version of every stage's weights.

Nothing here is the package's. For sample i and stage s of S, with k samples in flight and D_s = k (S - 1 - s), the
forward pass sees version max(0, i - D_s), moved by what the prediction says, the backward pass version i. Writing
other values into a parameter between the two passes is how weights change under the activations of a pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOMENTUM, DECAY, BETAS, EPS = 0.9, 1e-2, (0.9, 0.999), 1e-8


class Version(NamedTuple):
    """A stage's weights after some updates, the velocities that an update would subtract, and its learning rate."""

    weights: list[Tensor]
    velocities: list[Tensor]
    lr: float


class Oracle:
    """The simulation of one run.

    Args:
        net: the model; trained in place.
        stages: the parameters of every stage.
        parts: of ``mitigation=``.
        adam: Adam's update without weight decay, else SGD with momentum and coupled weight decay.
        lr: update -> learning rate.
        k: samples in flight.
        horizon: multiple of the delay to predict and compensate for.
        gamma: of gradient shrinking.
    """

    def __init__(
        self, net: nn.Module, stages: Sequence[Sequence[nn.Parameter]], parts: set[str], *, lr: Callable[[int], float],
        adam: bool = False, k: int = 2, horizon: float = 1.0, gamma: float = 0.9,
    ) -> None:  # fmt: skip
        self.net, self.stages, self.parts, self.adam = net, stages, parts, adam
        self.lr, self.k, self.horizon, self.gamma = lr, k, horizon, gamma
        self.history = [[self.version(stage, [torch.zeros_like(p) for p in stage], 0)] for stage in stages]
        self.moments: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self.losses: list[float] = []

    def version(self, stage: Sequence[nn.Parameter], velocities: list[Tensor], t: int) -> Version:
        return Version([p.detach().clone() for p in stage], velocities, self.lr(t))

    def delay(self, s: int) -> int:
        return self.k * (len(self.stages) - 1 - s)

    def forward_weights(self, s: int, i: int) -> list[Tensor]:
        t = max(0, i - self.delay(s))
        weights, velocities, lr = self.history[s][t]
        ahead = self.horizon * self.delay(s)
        if "spectrain" in self.parts:
            behind = len(self.stages) - s - 1
            ahead = {2: 2 * (len(self.stages) - 1) - s, 1: s // 2 + behind}[self.k]
        if "lwp_w" in self.parts:
            before = self.history[s][max(0, t - 1)].weights
            return [w + ahead * (w - old) for w, old in zip(weights, before, strict=True)]
        if self.parts & {"lwp", "spectrain"}:
            return [w - lr * ahead * v for w, v in zip(weights, velocities, strict=True)]
        return weights

    def backward_weights(self, s: int, i: int) -> list[Tensor]:
        if "stash" in self.parts:
            return self.forward_weights(s, i)
        weights, velocities, lr = self.history[s][i]
        ahead = {2: s, 1: s // 2}[self.k] if "spectrain" in self.parts else 0
        return [w - lr * ahead * v for w, v in zip(weights, velocities, strict=True)]

    def put(self, weights_of: Callable[[int, int], list[Tensor]], i: int) -> None:
        for s, stage in enumerate(self.stages):
            for p, w in zip(stage, weights_of(s, i), strict=True):
                p.data.copy_(w)

    def sample(self, i: int, x: Tensor, y: Tensor) -> None:
        self.put(self.forward_weights, i)
        loss = F.cross_entropy(self.net(x), y)
        self.put(self.backward_weights, i)
        self.net.zero_grad()
        loss.backward()
        self.put(lambda s, i: self.history[s][i].weights, i)
        self.losses.append(loss.item())
        made = [self.update(s, stage) for s, stage in enumerate(self.stages)]
        for versions, stage, velocities in zip(self.history, self.stages, made, strict=True):
            versions.append(self.version(stage, velocities, i + 1))

    @torch.no_grad()
    def update(self, s: int, stage: Sequence[nn.Parameter]) -> list[Tensor]:
        version, late, made = self.history[s][-1], self.delay(s), []
        m, compensated = MOMENTUM, self.horizon * late if "sc" in self.parts else 0.0
        a, b = m**compensated, (1 - m**compensated) / (1 - m)
        for p, v in zip(stage, version.velocities, strict=True):
            assert p.grad is not None
            g = p.grad * (self.gamma**late if "shrink" in self.parts else 1.0)
            if self.adam:
                velocity = self.adam_direction(p, g, len(self.history[s]))
                p.sub_(version.lr * velocity)
            else:
                g = g + DECAY * p
                velocity = m * v + g
                p.sub_(version.lr * (a * velocity + b * g))
            made.append(velocity)
        return made

    def adam_direction(self, p: Tensor, g: Tensor, t: int) -> Tensor:
        first, second = self.moments.get(p, (torch.zeros_like(g), torch.zeros_like(g)))
        first = BETAS[0] * first + (1 - BETAS[0]) * g
        second = BETAS[1] * second + (1 - BETAS[1]) * g * g
        self.moments[p] = (first, second)
        return (first / (1 - BETAS[0] ** t)) / (second.sqrt() / math.sqrt(1 - BETAS[1] ** t) + EPS)
