"""One rank of the pipeline: forward and backward passes and updates of its stages, and what it sends and is sent.

Rank 0 has the last stage, because loss, logs and checkpoints are rank 0's: position p of the pipeline is rank
P - 1 - p. In every step a rank runs the next sample forward, then the oldest one backward whose gradient is due, and
updates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eff.errors import UnsupportedCombinationError
from lightning_eff.runtime.rng import USER, Randomness
from lightning_eff.runtime.roll_call import RollCall
from lightning_eff.strategies.pipelined_bp.channel import DATA, NOTHING, Channel, Message
from lightning_eff.strategies.pipelined_bp.partition import Cut
from lightning_eff.strategies.pipelined_bp.profiling import Look
from lightning_eff.strategies.pipelined_bp.stack import Captured, Carry, Entry, Stack, run
from lightning_eff.strategies.pipelined_bp.timeline import Timeline
from lightning_eff.strategies.pipelined_bp.weights import Weights

_COUNTED = 1000
"""More than the collectives between two micro-batches."""


@dataclass
class _Flight:
    """A sample whose gradient has not come back.

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
    """The same tensor, no longer a leaf: the first layer of a stage may work in place."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        return grad


class Runner:
    """See the module.

    Args:
        stack: layers of the model.
        look: what was seen of them.
        found: where they are cut.
        weights: of this rank's stages.
        randomness: streams of random numbers.
        timeout: after which a message that does not come is an error.
        roll: where ranks note how far they have come.
    """

    def __init__(
        self,
        stack: Stack,
        look: Look,
        found: Cut,
        weights: Weights,
        randomness: Randomness,
        *,
        timeout: timedelta,
        roll: RollCall,
    ) -> None:
        self.stack, self.look, self.cut, self.weights, self.randomness = stack, look, found, weights, randomness
        self.positions = len(found.ranks_start)
        self.position = self.positions - 1 - (dist.get_rank() if self.positions > 1 else 0)
        self.is_first, self.is_last = self.position == 0, self.position == self.positions - 1
        self.device, self._roll = randomness.device, roll
        self.timeline = Timeline(self.position, self.device)
        self.figures = (0.0, 0.0, 0.0)
        in_flight = weights.stages[0].in_flight
        self._real_delay = in_flight * (self.positions - 1 - self.position)
        self._flights: deque[_Flight] = deque()
        self._fingerprint = 0
        self.arrived: bool | None = None
        """Whether this step has brought a gradient; None while the pipeline fills."""
        self._channels(in_flight, timeout)

    def _channels(self, in_flight: int, timeout: timedelta) -> None:
        self._in: Any = None
        self._out: Any = None
        self._grads_in: Any = None
        self._grads_out: Any = None
        self._groups: list[Any] = []
        if self.positions == 1:
            return
        with self.together("the first micro-batch, connecting"):
            self._groups = [dist.new_group(timeout=timeout) for _ in range(2)]
        forward, backward = self._groups
        carrier = torch.device("cpu") if dist.get_backend(forward) == "gloo" else None
        self._unfinished = in_flight * self.positions + 4

        def channel(group: Any, source: int, destination: int, first_stage: int, *, grads: bool) -> Channel:
            sizes = self.look.sizes[self.cut.starts[first_stage]]
            sizes = [size for size in sizes if size[2]] if grads else sizes
            ranks = (self.positions - 1 - source, self.positions - 1 - destination)
            return Channel(group, *ranks, sizes, self.device, carrier=carrier)

        here, (mine, *_) = self.position, self.cut.stages_of(self.position)
        if not self.is_first:
            self._in = channel(forward, here - 1, here, mine, grads=False)
            self._grads_out = channel(backward, here, here - 1, mine, grads=True)
            self._in.ask()
        if not self.is_last:
            following = self.cut.stages_of(here + 1)[0]
            self._out = channel(forward, here, here + 1, following, grads=False)
            self._grads_in = channel(backward, here + 1, here, following, grads=True)
            self._grads_in.ask()

    # ------------------------------------------------------------------------------------------ forward

    @property
    def sample(self) -> int:
        """Number of the newest sample."""
        return self.weights.samples - 1

    def forward(self, step: Callable[[], Any], without_user: Callable[[Callable[[], Any]], Any], mark: int) -> Any:
        """Run the next sample forward.

        Args:
            step: the user's ``training_step``.
            without_user: runs its argument in the context of a training step, for a rank that needs none of the user's
                code.
            mark: fingerprint of the batch.

        Returns:
            What the user's ``training_step`` returned, on the last position; None elsewhere.
        """
        self.weights.before_forward()
        sample, self._fingerprint, self.arrived = self.sample, mark, None
        self._note(sample)
        self.timeline.switch("forward", sample)
        try:
            with self.randomness.of(sample, USER):
                if not (self.is_first or self.is_last):
                    without_user(lambda: self._pass_on(self._received()))
                    return None
                return self._with_user(step)
        finally:
            self.weights.after_pass()
            self.timeline.switch("other", sample)

    def _with_user(self, step: Callable[[], Any]) -> Any:
        with Entry(self.stack, self._inside) as entry:
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

    def _inside(self, carry: Carry) -> Any:
        if self.is_first:
            self.look.forms[0].tensors(carry)  # raises if it is not what it was in the first batch
        ins = [] if self.is_first else self._received()
        if not self.is_last:
            self._pass_on(ins, carry)
            raise Captured
        return self._run(ins, carry).x

    def _received(self) -> list[Tensor]:
        message = self._wait_for(self._in, self.sample)
        if self.is_last and message.fingerprint != self._fingerprint:
            raise UnsupportedCombinationError(
                f"The first and the last stage have different batches in micro-batch {self.sample}: every process has "
                "to load the same data in the same order. Do not shard by rank (no DistributedSampler of your own), "
                "and draw random numbers from torch, numpy or random alone, seeded by nothing that differs by rank."
            )
        self._fingerprint, self.figures = message.fingerprint, message.figures
        return message.tensors

    def _run(self, ins: list[Tensor], carry: Carry) -> Carry:
        """Run this rank's stages on what came in, or on what the user's code brought to the first."""
        stages = self.cut.stages_of(self.position)
        if not self.is_first:
            entering = [_Inlet.apply(t) if t.requires_grad else t for t in ins]
            carry = self.look.forms[self.cut.starts[stages[0]]].carry(entering)
        with self.randomness.kept():
            for stage in stages:
                self.randomness.enter(self.sample, stage)
                carry = run([self.stack.layers[i] for i in self.cut.layers_of(stage, len(self.stack))], carry)
        self._ins = [t for t in ins if t.requires_grad]
        return carry

    def _pass_on(self, ins: list[Tensor], carry: Carry | None = None) -> None:
        carry = self._run(ins, carry or Carry(None))
        following = self.cut.stages_of(self.position + 1)[0]
        outs = self.look.forms[self.cut.starts[following]].tensors(carry)
        self.timeline.switch("transfer", self.sample)
        figures = self._own_figures()
        self._send(self._out, Message(DATA, self.sample, outs, self._fingerprint, figures))
        needed = [t for t in outs if t.requires_grad]
        # Not the updates made so far: after a drain, and with several stages here, older versions than that are seen.
        version = max(0, self.sample - self.weights.stages[0].delay)
        self._flights.append(_Flight(self.sample, needed, self._ins, version))

    def _own_figures(self) -> tuple[float, float, float]:
        """What came from the stages before and this one's: sums of utilisation and transfer, the first's staleness."""
        sums = self.timeline.run if self.timeline.recent.micro_batches < 8 else self.timeline.recent
        utilisation, transfer_s, staleness = self.figures
        own_transfer = sums.per_micro_batch(sums.transfer_s)
        mine = sums.per_micro_batch(sums.staleness) if self.is_first else staleness
        return utilisation + sums.utilisation, transfer_s + own_transfer, mine

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
        self.timeline.micro_batch(0 if self.positions > 1 else min(sample, self.weights.stages[0].delay))
        self.timeline.switch("other", sample)
        return result

    def no_loss(self) -> None:
        """Tell the other stages that the newest sample has no gradient (last position)."""
        self.arrived = False
        if self._grads_out is not None:
            self._send(self._grads_out, Message(NOTHING, self.sample, []))

    def backward_of_oldest(self) -> None:
        """Wait for the oldest sample's gradient and run it backward (not on the last position)."""
        flight = self._flights.popleft()
        message = self._wait_for(self._grads_in, flight.sample)
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
        elif self._grads_out is not None:
            self._send(self._grads_out, Message(NOTHING, flight.sample, []))
        self.timeline.micro_batch(self.weights.updates - flight.version)
        self.timeline.switch("other", flight.sample)

    def update(self, step: Callable[[], Any]) -> None:
        """Update this rank's stages if a gradient has arrived."""
        if self.arrived:
            self.timeline.switch("update", self.sample)
            self.weights.update(step)
            self.timeline.switch("other", self.sample)
        elif self.arrived is False:
            self.weights.skip_update()

    def _send_back(self, ins: list[Tensor]) -> None:
        if self._grads_out is None:
            return
        self.timeline.switch("transfer", self.sample)
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in ins]
        self._send(self._grads_out, Message(DATA, self.sample, grads))

    def record(self) -> dict[str, float]:
        """What all stages did since the last record, as far as it has come to the last position."""
        utilisation, transfer_s, staleness = self._own_figures()
        self.timeline.record()
        metrics = {"staleness": staleness}
        if self.positions > 1:
            mean = utilisation / self.positions
            metrics |= {"utilisation": mean, "bubble_fraction": 1 - mean, "transfer_s": transfer_s / self.positions}
        return {f"eff/pipelined_bp/{name}": value for name, value in metrics.items()}

    # ------------------------------------------------------------------------------------------ messages

    # Ranks count differently often to the same micro-batch: how far one has come is counted anew from each.

    def _note(self, sample: int) -> None:
        if self.positions > 1:
            self._roll.calls = _COUNTED * (sample + 1)
            self._roll.note(f"micro-batch {sample}")

    def _wait_for(self, channel: Channel, sample: int) -> Message:
        self.timeline.switch("wait", sample)
        before = self._roll.calls
        with self._roll(f"micro-batch {self.sample}, waiting for rank {channel.source}"):
            message = channel.receive()
        self._roll.calls = before  # one that waits is further than one that computes, or hangs, afterwards
        self._roll.note(f"micro-batch {self.sample}")
        self.timeline.switch("forward", sample)
        return message

    def _send(self, channel: Channel, message: Message) -> None:
        try:
            channel.send(message)
            channel.settle(self._unfinished)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            with self._roll(f"micro-batch {message.sample}, sending to rank {channel.destination}"):
                raise

    def together(self, where: str) -> AbstractContextManager[None]:
        """Around a collective between two micro-batches: name the ranks that do not come."""
        return self._roll(where) if self.positions > 1 else nullcontext()

    def close(self) -> None:
        """Answer what the neighbours have asked for in advance; nothing may be in flight."""
        channels = [c for c in (self._in, self._grads_in) if c is not None]
        sending = [c for c in (self._out, self._grads_out) if c is not None]
        for channel in sending:
            channel.end_sending()
        for channel in channels:
            channel.end_receiving()
        for channel in sending:
            channel.settle()
        if self._groups:
            with self.together("the end of training"):
                dist.barrier()
        self._disconnect()

    def _disconnect(self) -> None:
        for group in self._groups:
            dist.destroy_process_group(group)
        self._groups = []

    def abandon(self) -> None:
        """After an error: close the connections, so that the neighbours learn of it though this process may live on."""
        for channel in (self._in, self._out, self._grads_in, self._grads_out):
            if channel is not None:
                channel.abandon()
        self._disconnect()
