"""What stages send each other: the tensors of one micro-batch in one message of a size that both sides know.

A message is a header of int64, then the tensors, each at a multiple of 64 bytes. Its size is agreed once, from the
first batch; a smaller micro-batch (the last of an epoch) leaves the rest unused, a larger one goes on in further parts
of the same size. So the receiver can ask for the next messages before they are there, and their transfer hides behind
the computation of this one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eff.errors import UnsupportedCombinationError

ALIGNMENT = 64
_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
_MAX_DIMS = 8
_FIXED = 8
_PER_TENSOR = 3 + _MAX_DIMS

DATA, NOTHING, END = 0, 1, 2
"""Kinds: tensors; a micro-batch without a gradient; no more will come."""

Sizes = Sequence[tuple[torch.Size, torch.dtype, bool]]


class Figures(NamedTuple):
    """Sums over the stages that a micro-batch has passed, of what they did lately.

    Attributes:
        utilisation: shares of the time in which they computed.
        transfer_s: seconds per micro-batch of sending that computation does not hide.
        staleness: updates between forward and backward of a sample, in the first stage.
    """

    utilisation: float = 0.0
    transfer_s: float = 0.0
    staleness: float = 0.0


class Message(NamedTuple):
    """Holds what one stage sends another of one micro-batch.

    Attributes:
        kind: :data:`DATA`, :data:`NOTHING` or :data:`END`.
        sample: number of the micro-batch.
        tensors: with ``requires_grad`` as on the other side.
        fingerprint: of the batch the sender had; 0 for none.
        figures: what the stages before did.
    """

    kind: int
    sample: int
    tensors: list[Tensor]
    fingerprint: int = 0
    figures: Figures = Figures()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _payload_bytes(sizes: Sizes) -> int:
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype, _ in sizes)


def _finish(works: list[Any]) -> None:
    """Wait for transfers and forget them: in the frames of an error's traceback they would keep their connection."""
    try:
        for i in range(len(works)):
            works[i].wait()
    finally:
        works.clear()


@dataclass
class Channel:
    """Sends messages from one rank to another, in order.

    Args:
        group: process group of this direction: a backend that keeps the order of what it does (NCCL) must not wait for
            a message of the other direction.
        source: sending rank.
        destination: receiving rank.
        sizes: tensors of a usual message.
        device: where they lie.
        ahead: messages the receiver asks for in advance.
        carrier: device that messages are sent from, if it is another: gloo sends from the CPU alone.
    """

    group: Any
    source: int
    destination: int
    sizes: Sizes
    device: torch.device
    ahead: int = 2
    carrier: torch.device | None = None

    def __post_init__(self) -> None:
        self._carrier = self.device if self.carrier is None else self.carrier
        self._header_bytes = _aligned(8 * (_FIXED + _PER_TENSOR * len(self.sizes)))
        self._part_bytes = self._header_bytes + _payload_bytes(self.sizes)
        self._asked: deque[tuple[list[Any], Tensor]] = deque()
        self._sent: deque[tuple[list[Any], Tensor]] = deque()

    # ------------------------------------------------------------------------------------------ sending

    def send(self, message: Message) -> None:
        """Send a message without waiting until it has arrived."""
        sizes = [(t.shape, t.dtype, t.requires_grad) for t in message.tensors]
        if len(sizes) > len(self.sizes) or any(len(shape) > _MAX_DIMS for shape, _, _ in sizes):
            raise UnsupportedCombinationError(
                f"A stage passes on {len(sizes)} tensors with up to {max(len(shape) for shape, _, _ in sizes)} "
                f"dimensions; in the first batch there were {len(self.sizes)}, and {_MAX_DIMS} dimensions are the most."
            )
        if unknown := [dtype for _, dtype, _ in sizes if dtype not in _DTYPES]:
            raise UnsupportedCombinationError(f"A stage passes on a tensor of {unknown[0]}, which cannot be sent.")
        nbytes = _payload_bytes(sizes)
        buffer = torch.empty(self._parts(nbytes) * self._part_bytes, dtype=torch.uint8, device=self._carrier)
        buffer[: self._header_bytes].copy_(self._header(message, sizes, nbytes))
        at = self._header_bytes
        for t in message.tensors:
            length = t.numel() * t.element_size()
            if length:
                buffer[at : at + length].view(t.dtype).view(t.shape).copy_(t.detach())
            at += _aligned(length)
        parts = buffer.split(self._part_bytes)
        self._sent.append(([dist.isend(part, self.destination, group=self.group) for part in parts], buffer))

    def _parts(self, nbytes: int) -> int:
        return max(1, -(-(self._header_bytes + nbytes) // self._part_bytes))

    def _header(self, message: Message, sizes: Sizes, nbytes: int) -> Tensor:
        figures = torch.tensor(message.figures, dtype=torch.float64, device="cpu").view(torch.int64).tolist()
        words = [message.kind, message.sample, len(sizes), nbytes, message.fingerprint, *figures]
        for shape, dtype, needs_grad in sizes:
            words += [_DTYPES.index(dtype), int(needs_grad), len(shape), *shape, *[0] * (_MAX_DIMS - len(shape))]
        words += [0] * (self._header_bytes // 8 - len(words))
        return torch.tensor(words, dtype=torch.int64, device="cpu").view(torch.uint8)

    def settle(self, unfinished: int = 0) -> None:
        """Wait until no more than ``unfinished`` messages are still being sent; their buffers are free then."""
        while len(self._sent) > unfinished:
            _finish(self._sent.popleft()[0])

    # ------------------------------------------------------------------------------------------ receiving

    def ask(self) -> None:
        """Ask for the next messages."""
        while len(self._asked) < self.ahead:
            buffer = torch.empty(self._part_bytes, dtype=torch.uint8, device=self._carrier)
            self._asked.append(([dist.irecv(buffer, self.source, group=self.group)], buffer))

    def receive(self) -> Message:
        """Wait for the next message."""
        buffer = self._next_part()
        words = buffer[: self._header_bytes].view(torch.int64).tolist()
        kind, sample, count, nbytes, fingerprint = words[:5]
        figures = torch.tensor(words[5:_FIXED], dtype=torch.int64, device="cpu").view(torch.float64).tolist()
        if (parts := self._parts(nbytes)) > 1:
            buffer = torch.cat([buffer, *(self._next_part() for _ in range(parts - 1))])
        if kind != END:
            self.ask()
        tensors, at = [], self._header_bytes
        for i in range(count):
            dtype, needs_grad, dims, *shape = words[_FIXED + i * _PER_TENSOR : _FIXED + (i + 1) * _PER_TENSOR]
            size, kind_of = torch.Size(shape[:dims]), _DTYPES[dtype]
            length = math.prod(size) * kind_of.itemsize
            t = buffer[at : at + length].view(kind_of).view(size).to(self.device)
            tensors.append(t.requires_grad_(bool(needs_grad)))
            at += _aligned(length)
        return Message(kind, sample, tensors, fingerprint, Figures(*figures))

    def _next_part(self) -> Tensor:
        self.ask()
        works, buffer = self._asked.popleft()
        _finish(works)
        return buffer

    # ------------------------------------------------------------------------------------------ the end

    def end_sending(self) -> None:
        """Answer what the receiver has asked for in advance."""
        for _ in range(self.ahead):
            self.send(Message(END, -1, []))

    def end_receiving(self) -> None:
        """Take the answers to what was asked for in advance."""
        while self._asked:
            _finish(self._asked.popleft()[0])

    def abandon(self) -> None:
        """Let go of what is under way: gloo keeps a connection for as long as anything waits for it."""
        self._asked.clear()
        self._sent.clear()
        self.group = None
