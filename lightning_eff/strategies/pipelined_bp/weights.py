"""The weights of the stages on one rank: which version a pass sees, and how an update is made.

*Version* v of a stage's weights is what v updates have made of them. Sample i runs forward with version
max(0, i - D_s) and backward with version i, in which the i updates before its own are done. A rank of a pipeline
reaches these versions by itself, because gradients arrive D_s samples late. Where updates come earlier, in the
single-process emulation, with several stages on a rank, or when the pipeline has been drained, versions that a later
forward pass will need are kept. The two ways give the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_eff.functional.staleness.mitigation import (
    add_spikes_,
    extrapolate_weights_,
    predict_weights_,
    shrink_factor,
    spectrain_horizons,
    spike_coefficients,
)
from lightning_eff.functional.staleness.schedule import stage_delay
from lightning_eff.strategies.pipelined_bp.mitigation import Group, Mitigation, velocity


class Prediction(NamedTuple):
    """Says how weights are predicted, wherever their values lie.

    Attributes:
        parameters: whose weights they are.
        apply: overwrites their values, given in this order, by the predicted ones.
    """

    parameters: list[nn.Parameter]
    apply: Callable[[list[Tensor]], None]


@dataclass
class Stage:
    """Holds one stage and what is remembered of its weights.

    Attributes:
        index: s.
        stages: S.
        in_flight: see :func:`~lightning_eff.functional.stage_delay`.
        parameters: those that are trained, in the optimizer's order.
        versions: version -> weights as a forward pass is to see them.
        stashed: (sample, weights) of forward passes whose backward pass is to see the same.
        previous: weights before the last update, for ``lwp_w``.
        delay: D_s.
    """

    index: int
    stages: int
    in_flight: int
    parameters: list[nn.Parameter]
    versions: dict[int, list[Tensor]] = field(default_factory=dict)
    stashed: deque[tuple[int, list[Tensor]]] = field(default_factory=deque)
    previous: list[Tensor] | None = None

    def __post_init__(self) -> None:
        self.delay = stage_delay(self.index, self.stages, in_flight=self.in_flight)

    def horizons(self, mitigation: Mitigation) -> tuple[float, float]:
        """Return the updates to look ahead, in forward and in backward passes."""
        if "spectrain" in mitigation.parts:
            forward, backward = spectrain_horizons(self.index, self.stages, in_flight=self.in_flight)
            return float(forward), float(backward)
        return (mitigation.horizon * self.delay if mitigation.predicts else 0.0), 0.0


class Weights:
    """Keeps the weights of the stages on this rank: puts versions in place for passes and makes updates.

    Args:
        stages: in order.
        mitigation: what is done about the delay.
        optimizer: the user's.

    Attributes:
        samples: forward passes begun.
        updates: updates made.
    """

    def __init__(self, stages: Sequence[Stage], mitigation: Mitigation, optimizer: torch.optim.Optimizer) -> None:
        self.stages, self.mitigation, self.optimizer = list(stages), mitigation, optimizer
        self.samples = self.updates = 0
        self._true: dict[int, Tensor] = {}
        self._changed: list[nn.Parameter] = []
        self._ahead = {stage.index: stage.horizons(mitigation) for stage in stages}
        self._members: dict[int, list[tuple[int, list[nn.Parameter]]]] = {}
        for stage in self.stages:
            ids = {id(p) for p in stage.parameters}
            parts = [(i, [p for p in g["params"] if id(p) in ids]) for i, g in enumerate(optimizer.param_groups)]
            self._members[stage.index] = [(i, own) for i, own in parts if own]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all stages that are trained."""
        return [p for stage in self.stages for p in stage.parameters]

    def groups(self, stage: Stage) -> Iterator[tuple[Group, list[nn.Parameter]]]:
        """Yield the optimizer's groups and which of their parameters are in this stage."""
        for i, own in self._members[stage.index]:
            yield self.optimizer.param_groups[i], own

    # ------------------------------------------------------------------------------------------ passes

    @torch.no_grad()
    def before_forward(self) -> None:
        """Put the weights in place that the next sample's forward pass is to see."""
        sample = self.samples
        self.samples += 1
        passes = []
        for stage in self.stages:
            ahead, _ = self._ahead[stage.index]
            seen = stage.versions.get(max(0, sample - stage.delay))  # version max(0, i - D_s)
            needed = max(0, sample + 1 - stage.delay)  # by the next sample
            for version in [v for v in stage.versions if v < needed]:
                del stage.versions[version]
            if self.mitigation.stashes and stage.delay:
                seen = seen or self._predicted(stage, ahead)
                stage.stashed.append((sample, seen))
            passes.append((stage, seen, ahead))
        self._put(passes)

    @torch.no_grad()
    def before_backward(self) -> None:
        """Put the weights in place that the backward pass of the oldest sample is to see: that of this update."""
        self._put([
            (stage, stage.stashed.popleft()[1] if stage.stashed else None, self._ahead[stage.index][1])
            for stage in self.stages
        ])  # fmt: skip

    @torch.no_grad()
    def after_pass(self) -> None:
        """Put the true weights back."""
        changed, self._changed = self._changed, []
        if changed:
            torch._foreach_copy_([p.data for p in changed], [self._true[id(p)] for p in changed])

    def _put(self, passes: Sequence[tuple[Stage, list[Tensor] | None, float]]) -> None:
        """Put other weights in place: of each stage the given ones, or those predicted so far ahead, if there are any.

        Written through .data: graphs in flight go on to read these parameters, whatever is in them.
        """
        kept = [(stage, seen) for stage, seen, _ in passes if seen is not None]
        predictions = [
            how for stage, seen, ahead in passes if seen is None for how in self.predictions_of(stage, ahead)
        ]
        self._changed = [p for stage, _ in kept for p in stage.parameters]
        self._changed += [p for how in predictions for p in how.parameters]
        if not self._changed:
            return
        data = [p.data for p in self._changed]
        for p, d in zip(self._changed, data, strict=True):
            if id(p) not in self._true:
                self._true[id(p)] = torch.empty_like(d)
        torch._foreach_copy_([self._true[id(p)] for p in self._changed], data)
        if known := [w for _, seen in kept for w in seen]:
            torch._foreach_copy_(data[: len(known)], known)
        for how in predictions:
            how.apply([p.data for p in how.parameters])

    def predictions_of(self, stage: Stage, ahead: float) -> list[Prediction]:
        """Return how the weights as they are now are turned into those ``ahead`` updates from now."""
        if not ahead:
            return []
        if "lwp_w" in self.mitigation.parts:
            if stage.previous is None:
                return []
            # w_t + T (w_t - w_{t-1})
            return [Prediction(stage.parameters, partial(extrapolate_weights_, previous=stage.previous, horizon=ahead))]
        predictions = []
        for group, own in self.groups(stage):
            velocities = [(p, velocity(p, self.optimizer, group)) for p in own]
            known = [(p, v) for p, v in velocities if v is not None]
            if known and (lr := float(group["lr"])) * ahead:
                # w_t - lr T v_t
                apply = partial(predict_weights_, velocities=[v for _, v in known], lr=lr, horizon=ahead)
                predictions.append(Prediction([p for p, _ in known], apply))
        return predictions

    def _predicted(self, stage: Stage, ahead: float) -> list[Tensor]:
        """Return a copy of the weights, ``ahead`` updates from now."""
        copies = [p.detach().clone() for p in stage.parameters]
        copy_of = {id(p): copy for p, copy in zip(stage.parameters, copies, strict=True)}
        for how in self.predictions_of(stage, ahead):
            how.apply([copy_of[id(p)] for p in how.parameters])
        return copies

    # ------------------------------------------------------------------------------------------ updates

    @torch.no_grad()
    def update(self, step: Callable[[], Any]) -> None:
        """Make the update of the oldest sample whose gradient has not been applied.

        Args:
            step: the optimizer's own, without closure.
        """
        self.keep_versions()
        for stage in self.stages:
            if "lwp_w" in self.mitigation.parts and stage.delay:
                stage.previous = [p.detach().clone() for p in stage.parameters]
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.parameters)):
            self._step(step)
        self.updates += 1

    @torch.no_grad()
    def skip_update(self) -> None:
        """Pass over the update of the oldest sample, which has no gradient (``training_step`` returned None)."""
        self.keep_versions()
        for stage in self.stages:  # and no backward pass that is to see these
            while stage.stashed and stage.stashed[0][0] <= self.updates:
                stage.stashed.popleft()
        self.updates += 1

    def keep_versions(self) -> None:
        """Keep the weights that are about to be updated where a later forward pass is to see them."""
        for stage in self.stages:
            if stage.delay and self.updates >= max(0, self.samples - stage.delay):
                stage.versions[self.updates] = self._predicted(stage, self._ahead[stage.index][0])

    def _step(self, step: Callable[[], Any]) -> None:
        """Step the user's optimizer, with what the mitigation adds, one parameter group for each group and stage."""
        optimizer, compensates = self.optimizer, "sc" in self.mitigation.parts
        if not any(stage.delay for stage in self.stages) or not (compensates or self.mitigation.gamma != 1.0):
            step()
            return
        whole, parts, spikes = optimizer.param_groups, [], []
        for stage in self.stages:
            for group, own in self.groups(stage):
                part = {**group, "params": own}
                grads = [(p, p.grad) for p in own if p.grad is not None]
                if self.mitigation.gamma != 1.0 and stage.delay and grads:
                    factor = shrink_factor(stage.delay, self.mitigation.gamma)
                    torch._foreach_mul_([g for _, g in grads], factor)  # gamma^D g
                if compensates and stage.delay and grads:
                    # a = m^D, b = (1 - m^D) / (1 - m)
                    a, b = spike_coefficients(float(group["momentum"]), self.mitigation.horizon * stage.delay)
                    # Weight decay is part of the gradient, with today's weights, so that it is compensated for as well.
                    if decay := group["weight_decay"]:  # g + decay w
                        torch._foreach_add_([g for _, g in grads], [p.detach() for p, _ in grads], alpha=decay)
                    part |= {"lr": group["lr"] * a, "weight_decay": 0}  # the optimizer does w - lr a v'
                    spikes.append((grads, float(group["lr"]), b))
                parts.append((group, part))
        optimizer.param_groups = [part for _, part in parts]
        try:
            step()
        finally:
            optimizer.param_groups = whole
        for group, part in parts:  # some optimizers keep numbers there
            group.update({k: v for k, v in part.items() if k not in ("params", "lr", "weight_decay")})
        for grads, lr, b in spikes:
            add_spikes_([p for p, _ in grads], [g for _, g in grads], lr=lr, b=b)  # w - lr b g

    # ------------------------------------------------------------------------------------------ state

    def state(self) -> list[dict[str, Any]]:
        """Return what a resumed run needs besides weights and optimizer, for every stage; nothing may be in flight."""
        return [
            {
                "stage": stage.index,
                "versions": {str(v): [w.detach().cpu() for w in kept] for v, kept in stage.versions.items()},
                "previous": None if stage.previous is None else [w.detach().cpu() for w in stage.previous],
            }
            for stage in self.stages
        ]

    def load(self, samples: int, states: Sequence[dict[str, Any]]) -> None:
        """Go on where :meth:`state` was taken, after ``samples`` samples."""
        self.samples = self.updates = samples
        saved = {int(state["stage"]): state for state in states}
        for stage in self.stages:
            state = saved[stage.index]

            def on_device(values: Sequence[Tensor], stage: Stage = stage) -> list[Tensor]:
                return [w.to(p.device, p.dtype, copy=True) for w, p in zip(values, stage.parameters, strict=True)]

            stage.versions = {int(v): on_device(kept) for v, kept in state["versions"].items()}
            stage.previous = None if state["previous"] is None else on_device(state["previous"])
