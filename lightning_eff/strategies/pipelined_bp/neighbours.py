"""The neighbours of a rank in the pipeline: channels to and from the ranks that have the stages before and after.

Rank 0 has the last stage, because loss, logs and checkpoints are rank 0's: position p of the pipeline is rank
P - 1 - p.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lightning_eff.runtime.roll_call import RollCall
from lightning_eff.strategies.pipelined_bp.channel import Channel, Message
from lightning_eff.strategies.pipelined_bp.partition import Partition
from lightning_eff.strategies.pipelined_bp.profiling import Profile

__all__ = ["Neighbours"]

_COUNTED = 1000
"""More than the collectives between two micro-batches."""


class Neighbours:
    """Sends activations on and gradients back, receives the same, and names a neighbour that is lost.

    Args:
        position: p, of this rank in the pipeline.
        positions: P.
        roll_call: where ranks note how far they have come.
    """

    def __init__(self, *, position: int, positions: int, roll_call: RollCall) -> None:
        self.position = position
        self.positions = positions
        self._roll_call = roll_call
        self._groups: list[Any] = []
        self._unfinished = 0
        self._activations_in: Channel | None = None
        self._activations_out: Channel | None = None
        self._gradients_in: Channel | None = None
        self._gradients_out: Channel | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first stage."""
        return self.position == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage."""
        return self.position == self.positions - 1

    def connect(
        self, profile: Profile, partition: Partition, *, device: torch.device, in_flight: int, timeout: timedelta
    ) -> None:
        """Open the channels to both neighbours, on all ranks together.

        Args:
            profile: sizes of what passes between the layers.
            partition: of the layers into stages.
            device: where tensors lie.
            in_flight: samples a stage runs ahead of the next by.
            timeout: after which a message that does not come is an error.
        """
        if self.positions == 1:
            return
        with self.naming_lost_ranks("the first micro-batch, connecting"):
            self._groups = [dist.new_group(timeout=timeout) for _ in range(2)]
        forward, backward = self._groups
        carrier = torch.device("cpu") if dist.get_backend(forward) == "gloo" else None
        self._unfinished = in_flight * self.positions + 4

        def channel(group: Any, source: int, destination: int, first_stage: int, *, grads: bool) -> Channel:
            sizes = profile.sizes[partition.starts[first_stage]]
            sizes = [size for size in sizes if size[2]] if grads else sizes
            ranks = (self.positions - 1 - source, self.positions - 1 - destination)
            return Channel(group, *ranks, sizes, device, carrier=carrier)

        here, (own, *_) = self.position, partition.stages_of(self.position)
        if not self.is_first:
            self._activations_in = channel(forward, here - 1, here, own, grads=False)
            self._gradients_out = channel(backward, here, here - 1, own, grads=True)
            self._activations_in.ask()
        if not self.is_last:
            following = partition.stages_of(here + 1)[0]
            self._activations_out = channel(forward, here, here + 1, following, grads=False)
            self._gradients_in = channel(backward, here + 1, here, following, grads=True)
            self._gradients_in.ask()

    # ------------------------------------------------------------------------------------------ messages

    # Ranks count differently often to the same micro-batch: how far one has come is counted anew from each.

    def note_micro_batch(self, sample: int) -> None:
        """Note, for the other ranks to read, that this one begins a micro-batch."""
        if self.positions > 1:
            self._roll_call.calls = _COUNTED * (sample + 1)
            self._roll_call.note(f"micro-batch {sample}")

    def receive_activations(self, sample: int) -> Message:
        """Wait for what the stage before passes on of a sample."""
        return self._receive(self._activations_in, sample)

    def receive_gradients(self, sample: int) -> Message:
        """Wait for gradients from the stage after, in the micro-batch ``sample`` that this rank is at."""
        return self._receive(self._gradients_in, sample)

    def send_activations(self, message: Message) -> None:
        """Pass on what a stage has computed."""
        self._send(self._activations_out, message)

    def send_gradients(self, message: Message) -> None:
        """Send gradients back to the stage before, if there is one."""
        if not self.is_first:
            self._send(self._gradients_out, message)

    def _receive(self, channel: Any, sample: int) -> Message:
        before = self._roll_call.calls
        with self._roll_call(f"micro-batch {sample}, waiting for rank {channel.source}"):
            message: Message = channel.receive()
        self._roll_call.calls = before  # one that waits is further than one that computes, or hangs, afterwards
        self._roll_call.note(f"micro-batch {sample}")
        return message

    def _send(self, channel: Any, message: Message) -> None:
        try:
            channel.send(message)
            channel.settle(self._unfinished)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            with self._roll_call(f"micro-batch {message.sample}, sending to rank {channel.destination}"):
                raise

    def naming_lost_ranks(self, where: str) -> AbstractContextManager[None]:
        """Return the context of a collective between two micro-batches, in which ranks that do not come are named."""
        return self._roll_call(where) if self.positions > 1 else nullcontext()

    # ------------------------------------------------------------------------------------------ the end

    def close(self) -> None:
        """Answer what the neighbours have asked for in advance; nothing may be in flight."""
        receiving = [c for c in (self._activations_in, self._gradients_in) if c is not None]
        sending = [c for c in (self._activations_out, self._gradients_out) if c is not None]
        for channel in sending:
            channel.end_sending()
        for channel in receiving:
            channel.end_receiving()
        for channel in sending:
            channel.settle()
        if self._groups:
            with self.naming_lost_ranks("the end of training"):
                dist.barrier()
        self._disconnect()

    def abandon(self) -> None:
        """Close the connections after an error: the neighbours learn of it, though this process may live on."""
        for channel in (self._activations_in, self._activations_out, self._gradients_in, self._gradients_out):
            if channel is not None:
                channel.abandon()
        self._disconnect()

    def _disconnect(self) -> None:
        for group in self._groups:
            dist.destroy_process_group(group)
        self._groups = []
