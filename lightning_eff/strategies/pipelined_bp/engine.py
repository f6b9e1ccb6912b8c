"""One rank of the pipeline: forward and backward passes and updates of its stages.

In every step a rank runs the next sample forward, then the oldest one backward whose gradient is due, and updates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_eff.errors import UnsupportedCombinationError
from lightning_eff.runtime.rng import USER, Randomness
from lightning_eff.strategies.pipelined_bp.carry import Carry, run_layers
from lightning_eff.strategies.pipelined_bp.channel import DATA, NOTHING, Figures, Message
from lightning_eff.strategies.pipelined_bp.entry import Captured, Entry
from lightning_eff.strategies.pipelined_bp.neighbours import Neighbours
from lightning_eff.strategies.pipelined_bp.partition import Partition
from lightning_eff.strategies.pipelined_bp.profiling import Profile
from lightning_eff.strategies.pipelined_bp.stack import Stack
from lightning_eff.strategies.pipelined_bp.timeline import Timeline
from lightning_eff.strategies.pipelined_bp.weights import Weights

__all__ = ["Engine"]


@dataclass
class _Flight:
    """Holds a sample whose gradient has not come back.

    Attributes:
        sample: its number.
        outs: what was passed on and needs a gradient.
        ins: what had come in and needs a gradient.
        version: of the weights that the first stage here ran it forward with.
    """

    sample: int
    outs: list[Tensor]
    ins: list[Tensor]
    version: int


class _Inlet(torch.autograd.Function):
    """Returns the same tensor, no longer a leaf: the first layer of a stage may work in place."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        return grad


class Engine:
    """Runs one rank of the pipeline.

    Args:
        stack: layers of the model.
        profile: what was measured of them.
        partition: of the layers into stages.
        weights: of this rank's stages.
        randomness: streams of random numbers.
        neighbours: ranks with the stages before and after, connected.

    Attributes:
        timeline: when this rank computed and when it waited.
        arrived: whether this step has brought a gradient; None while the pipeline fills.
    """

    def __init__(
        self,
        stack: Stack,
        profile: Profile,
        partition: Partition,
        weights: Weights,
        randomness: Randomness,
        neighbours: Neighbours,
    ) -> None:
        self.stack = stack
        self.profile = profile
        self.partition = partition
        self.weights = weights
        self.randomness = randomness
        self.neighbours = neighbours
        self.position, self.positions = neighbours.position, neighbours.positions
        self.is_first, self.is_last = neighbours.is_first, neighbours.is_last
        self.device = randomness.device
        self.timeline = Timeline(self.position, self.device)
        self.arrived: bool | None = None
        # Gradients reach position p after k (P - 1 - p) further forward passes, k = in_flight.
        self._real_delay = weights.stages[0].in_flight * (self.positions - 1 - self.position)
        self._flights: deque[_Flight] = deque()
        self._ins: list[Tensor] = []
        self._fingerprint = 0
        self._figures = Figures()

    # ------------------------------------------------------------------------------------------ forward

    @property
    def sample(self) -> int:
        """Number of the newest sample."""
        return self.weights.samples - 1

    def forward(
        self, step: Callable[[], Any], *, without_user: Callable[[Callable[[], Any]], Any], fingerprint: int
    ) -> Any:
        """Run the next sample forward.

        Args:
            step: the user's ``training_step``.
            without_user: runs its argument in the context of a training step, for a rank that needs none of the user's
                code.
            fingerprint: of the batch.

        Returns:
            What the user's ``training_step`` returned, on the last position; None elsewhere.
        """
        self.weights.before_forward()
        sample, self._fingerprint, self.arrived = self.sample, fingerprint, None
        self.neighbours.note_micro_batch(sample)
        self.timeline.switch("forward", sample)
        try:
            with self.randomness.of(sample, USER):
                if not (self.is_first or self.is_last):
                    without_user(lambda: self._pass_on(self._receive()))
                    return None
                return self._run_with_user(step)
        finally:
            self.weights.after_pass()
            self.timeline.switch("other", sample)

    def _run_with_user(self, step: Callable[[], Any]) -> Any:
        """Run the user's ``training_step``, with this rank's stages in the place of the stack."""
        with Entry(self.stack, self._run_inside) as entry:
            try:
                out = step()
            except Captured:
                return None
        if not entry.entered:
            raise UnsupportedCombinationError(
                f"training_step did not run the layers of {self.stack.name or 'the model'!r} for this micro-batch; "
                "every stage of a pipeline sees every micro-batch. Run them always, or use strategy='ddp'."
            )
        return out

    def _run_inside(self, carry: Carry) -> Any:
        """Run this rank's stages where the user's code enters the stack; end the step there on the first position."""
        if self.is_first:
            self.profile.forms[0].tensors(carry)  # raises if it is not what it was in the first batch
        ins = [] if self.is_first else self._receive()
        if not self.is_last:
            self._pass_on(ins, carry)
            raise Captured
        return self._run_stages(ins, carry).x

    def _receive(self) -> list[Tensor]:
        """Wait for what the stage before passes on."""
        self.timeline.switch("wait", self.sample)
        message = self.neighbours.receive_activations(self.sample)
        self.timeline.switch("forward", self.sample)
        if self.is_last and message.fingerprint != self._fingerprint:
            raise UnsupportedCombinationError(
                f"The first and the last stage have different batches in micro-batch {self.sample}: every process has "
                "to load the same data in the same order. Do not shard by rank (no DistributedSampler of your own), "
                "and draw random numbers from torch, numpy or random alone, seeded by nothing that differs by rank."
            )
        self._fingerprint, self._figures = message.fingerprint, message.figures
        return message.tensors

    def _run_stages(self, ins: list[Tensor], carry: Carry) -> Carry:
        """Run this rank's stages on what came in, or on what the user's code brought to the first."""
        stages = self.partition.stages_of(self.position)
        if not self.is_first:
            entering = [_Inlet.apply(t) if t.requires_grad else t for t in ins]
            carry = self.profile.forms[self.partition.starts[stages[0]]].carry(entering)
        with self.randomness.kept():
            for stage in stages:
                self.randomness.enter(self.sample, stage)
                layers = self.partition.layers_of(stage, len(self.stack))
                carry = run_layers([self.stack.layers[i] for i in layers], carry)
        self._ins = [t for t in ins if t.requires_grad]
        return carry

    def _pass_on(self, ins: list[Tensor], carry: Carry | None = None) -> None:
        """Run this rank's stages, send on what they return, and remember it until its gradient comes."""
        carry = self._run_stages(ins, carry or Carry(None))
        following = self.partition.stages_of(self.position + 1)[0]
        outs = self.profile.forms[self.partition.starts[following]].tensors(carry)
        self.timeline.switch("transfer", self.sample)
        figures = self._add_own_figures()
        self.neighbours.send_activations(Message(DATA, self.sample, outs, self._fingerprint, figures))
        needed = [t for t in outs if t.requires_grad]
        # Sample i saw version max(0, i - D_s), not the updates made so far: after a drain, and with several stages
        # here, older versions than that are seen.
        version = max(0, self.sample - self.weights.stages[0].delay)
        self._flights.append(_Flight(self.sample, needed, self._ins, version))

    def _add_own_figures(self) -> Figures:
        """Return what came from the stages before, with this rank's added."""
        sums = self.timeline.run if self.timeline.recent.micro_batches < 8 else self.timeline.recent
        before = self._figures
        return Figures(
            utilisation=before.utilisation + sums.utilisation,
            transfer_s=before.transfer_s + sums.per_micro_batch(sums.transfer_s),
            staleness=sums.per_micro_batch(sums.staleness) if self.is_first else before.staleness,
        )

    # ------------------------------------------------------------------------------------------ backward

    @property
    def in_flight(self) -> int:
        """Samples whose gradient this rank waits for."""
        return len(self._flights)

    @property
    def gradient_is_due(self) -> bool:
        """Whether the pipeline is full: the oldest sample's gradient comes before the next one's forward pass."""
        return len(self._flights) > self._real_delay

    def backward_of_loss(self, backward: Callable[[], Any]) -> Any:
        """Run the loss backward (last position) and send back what it says of the stage's input."""
        sample = self.sample
        self.timeline.switch("backward", sample)
        self.weights.before_backward()
        try:
            result = backward()
        finally:
            self.weights.after_pass()
        self._send_back(self._ins)
        self.arrived = True
        # In one process sample i is run forward with version max(0, i - D_0) and updated as update i.
        self.timeline.count_micro_batch(0 if self.positions > 1 else min(sample, self.weights.stages[0].delay))
        self.timeline.switch("other", sample)
        return result

    def skip_loss(self) -> None:
        """Tell the other stages that the newest sample has no gradient (last position)."""
        self.arrived = False
        self.neighbours.send_gradients(Message(NOTHING, self.sample, []))

    def backward_of_oldest(self) -> None:
        """Wait for the oldest sample's gradient and run it backward (not on the last position)."""
        flight = self._flights.popleft()
        self.timeline.switch("wait", flight.sample)
        message = self.neighbours.receive_gradients(self.sample)
        self.timeline.switch("forward", flight.sample)
        self.arrived = message.kind == DATA
        if self.arrived:
            self.timeline.switch("backward", flight.sample)
            self.weights.before_backward()
            try:
                if flight.outs:
                    torch.autograd.backward(flight.outs, message.tensors)
            finally:
                self.weights.after_pass()
            self._send_back(flight.ins)
        else:
            self.neighbours.send_gradients(Message(NOTHING, flight.sample, []))
        self.timeline.count_micro_batch(self.weights.updates - flight.version)  # staleness: u - version
        self.timeline.switch("other", flight.sample)

    def update(self, step: Callable[[], Any]) -> None:
        """Update this rank's stages if a gradient has arrived.

        Args:
            step: the optimizer's own, without closure.
        """
        if self.arrived:
            self.timeline.switch("update", self.sample)
            self.weights.update(step)
            self.timeline.switch("other", self.sample)
        elif self.arrived is False:
            self.weights.skip_update()

    def _send_back(self, ins: list[Tensor]) -> None:
        """Send the gradients of what came in back to where it came from."""
        if self.is_first:
            return
        self.timeline.switch("transfer", self.sample)
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in ins]
        self.neighbours.send_gradients(Message(DATA, self.sample, grads))

    # ------------------------------------------------------------------------------------------ figures and end

    def take_figures(self) -> dict[str, float]:
        """Return what all stages did since the last record, as far as it has come to this position."""
        figures = self._add_own_figures()
        self.timeline.take_recent()
        metrics = {"staleness": figures.staleness}
        if self.positions > 1:
            utilisation = figures.utilisation / self.positions  # mean of u_p over the positions
            metrics["utilisation"] = utilisation
            metrics["bubble_fraction"] = 1 - utilisation
            metrics["transfer_s"] = figures.transfer_s / self.positions
        return {f"eff/pipelined_bp/{name}": value for name, value in metrics.items()}

    def close(self) -> None:
        """Part from the neighbours; nothing may be in flight."""
        self.neighbours.close()

    def abandon(self) -> None:
        """Close the connections to the neighbours after an error."""
        self.neighbours.abandon()
