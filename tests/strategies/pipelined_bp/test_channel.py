"""Messages between two stages: what is sent arrives, whatever its size, and at the end nothing is left under way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_eff.errors import UnsupportedCombinationError
from lightning_eff.strategies.pipelined_bp.channel import _DTYPES, ALIGNMENT, DATA, NOTHING, Channel, Message
from tests.harness import run_ranks
from tests.strategies.pipelined_bp.models import bits

CPU = torch.device("cpu")


GRADS = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)


Spec = tuple[tuple[int, ...], torch.dtype, bool]
"""Shape, dtype, whether it needs a gradient."""


def made(spec: Spec, seed: int = 0) -> Tensor:
    shape, dtype, needs_grad = spec
    bytes_ = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (bytes_,), generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.uint8).view(dtype).view(shape).requires_grad_(needs_grad)  # any bits: NaN and Inf too


def sizes_of(specs: list[Spec]) -> list[tuple[torch.Size, torch.dtype, bool]]:
    return [(torch.Size(shape), dtype, needs_grad) for shape, dtype, needs_grad in specs]


def told(message: Message) -> Any:
    flags = [(t.requires_grad, t.is_leaf, t.data_ptr() % min(t.element_size(), ALIGNMENT)) for t in message.tensors]
    return message.kind, message.sample, bits(message.tensors), flags, message.fingerprint, bits(message.figures)


def _exchange(rank: int, world: int, agreed: list[Spec], sent: list[list[Spec]], ahead: int) -> list[Any]:
    """Rank 1 sends, as an earlier stage does; both return what they have seen."""
    channel = Channel(dist.group.WORLD, 1, 0, sizes_of(agreed), CPU, ahead)
    figures = (0.5, -math.inf, 1e-300)
    messages = [
        Message(DATA, i, [made(spec, seed=10 * i + j) for j, spec in enumerate(specs)], 2**32 - 1 - i, figures)
        for i, specs in enumerate(sent)
    ]
    if rank == 1:
        for message in messages:
            channel.send(message)
        channel.end_sending()
        channel.settle()
        assert not channel._sent
        return [told(message) for message in messages]
    channel.ask()
    seen = []
    for _ in messages:
        seen.append(told(channel.receive()))
        assert len(channel._asked) == ahead, "it asks ahead"
    channel.end_receiving()
    assert not channel._asked
    return seen


def exchanged(agreed: list[Spec], sent: list[list[Spec]], ahead: int = 2) -> None:
    received, given_ = run_ranks(_exchange, 2, agreed, sent, ahead)
    assert received == given_
    assert len(received) == len(sent)


USUAL: list[Spec] = [((3, 5), torch.float32, True), ((3,), torch.bool, False)]


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_a_tensor_of_every_dtype_arrives_to_the_bit(dtype: torch.dtype) -> None:
    needs_grad = dtype in GRADS
    specs: list[Spec] = [
        ((3, 7), dtype, needs_grad),
        ((), dtype, False),
        ((0, 4), dtype, needs_grad),
        ((1,), dtype, False),
    ]
    exchanged(specs, [specs] * 3)


def test_of_each_whether_it_needs_a_gradient_and_it_is_a_leaf() -> None:
    both: list[Spec] = [((2,), torch.float32, True), ((2,), torch.float32, False)]
    exchanged(both, [both, both[::-1]])


@pytest.mark.parametrize("agreed", [[], [((0,), torch.float32, True)]], ids=["no tensor", "an empty one"])
def test_a_message_may_hold_next_to_nothing(agreed: list[Spec]) -> None:
    exchanged(agreed, [agreed, []])


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_sizes_may_change_from_message_to_message(ahead: int) -> None:
    """Smaller ones fit; larger ones go on in parts, of which the receiver has asked for the first ones already."""
    small: list[Spec] = [((1, 5), torch.float32, True), ((1,), torch.bool, False)]
    fewer: list[Spec] = [((3, 5), torch.float32, True)]
    twice: list[Spec] = [((6, 5), torch.float32, True), ((6,), torch.bool, False)]
    large: list[Spec] = [((50, 5), torch.float32, True), ((50,), torch.bool, False)]
    other: list[Spec] = [((2, 2, 2), torch.float64, True), ((3, 5), torch.bfloat16, False)]
    exchanged(USUAL, [USUAL, small, fewer, twice, large, large, twice, other, small, USUAL, large], ahead)


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


specs = st.sampled_from(_DTYPES).flatmap(
    lambda dtype: st.tuples(shapes, st.just(dtype), st.booleans() if dtype in GRADS else st.just(False))
)


@given(st.lists(specs, min_size=1, max_size=3).flatmap(
    lambda agreed: st.tuples(st.just(agreed), st.lists(st.lists(specs, max_size=len(agreed)), min_size=1, max_size=5))
))  # fmt: skip
@settings(max_examples=20)
def test_whatever_is_sent_arrives(case: tuple[list[Spec], list[list[Spec]]]) -> None:
    exchanged(*case)


def test_views_are_packed_where_messages_are_aligned() -> None:
    """The bytes of a message: a header of whole words, then every tensor at a multiple of 64."""
    channel = Channel(None, 1, 0, sizes_of(USUAL), CPU)
    assert channel._header_bytes % ALIGNMENT == channel._part_bytes % ALIGNMENT == 0
    assert channel._part_bytes - channel._header_bytes == ALIGNMENT * (1 + 1)  # 60 bytes, and 3


def _strided(rank: int, world: int) -> Any:
    channel = Channel(dist.group.WORLD, 1, 0, sizes_of([((4, 3), torch.float32, False)] * 2), CPU)
    rows = torch.arange(12.0).view(3, 4)
    if rank == 1:
        sent = rows.clone()
        channel.send(Message(DATA, 0, [sent.t(), torch.ones(1).expand(4, 3)]))
        sent.zero_()  # the sender goes on: what it has sent is a copy
        channel.end_sending()
        channel.settle()
        return True
    first, second = channel.receive().tensors
    channel.end_receiving()
    return torch.equal(first, rows.t()) and torch.equal(second, torch.ones(4, 3))


def test_a_tensor_need_not_be_contiguous_and_may_change_afterwards() -> None:
    assert run_ranks(_strided, 2) == [True, True]


@pytest.mark.parametrize(
    "given_", [[((1,) * 9, torch.float32, False)], [((1,), torch.float32, False)] * 2, [((1,), torch.uint16, False)]],
    ids=["dimensions", "tensors", "dtype"],
)  # fmt: skip
def test_what_does_not_fit_the_header_is_refused(given_: list[Spec]) -> None:
    channel = Channel(None, 1, 0, sizes_of([((1,), torch.float32, False)]), CPU)
    with pytest.raises(UnsupportedCombinationError, match="A stage passes on"):
        channel.send(Message(DATA, 0, [torch.zeros(shape, dtype=dtype) for shape, dtype, _ in given_]))


def _both_ways(rank: int, world: int, count: int) -> Any:
    """As two stages: samples one way, gradients the other, some of them without one, the end in between."""
    there, back = dist.new_group(), dist.new_group()
    samples = Channel(there, 1, 0, sizes_of(USUAL), CPU)
    gradients = Channel(back, 0, 1, sizes_of(USUAL[:1]), CPU)
    seen: list[Any] = []
    inward, outward = (samples, gradients) if rank == 0 else (gradients, samples)
    inward.ask()
    if rank == 1:
        for i in range(count):
            samples.send(Message(DATA, i, [made(spec, i) for spec in USUAL]))
            samples.settle(2)
            assert len(samples._sent) <= 2
    for i in range(count):
        message = inward.receive()
        assert message.sample == i
        seen.append((message.kind, bits(message.tensors)))
        if rank == 0:
            gradient = [made(USUAL[0], i).detach()]
            gradients.send(Message(NOTHING, i, []) if i % 3 == 1 else Message(DATA, i, gradient))
    outward.end_sending()
    inward.end_receiving()
    outward.settle()
    assert not any((inward._asked, outward._asked, inward._sent, outward._sent))
    # What was left posted in a group would be taken for this.
    for group in (there, back):
        value = torch.tensor([rank + 1])
        dist.send(value, 0, group=group) if rank else dist.recv(value, 1, group=group)
        seen.append(int(value))
    return seen


@pytest.mark.parametrize("count", [0, 1, 7])
def test_at_the_end_nothing_is_under_way(count: int) -> None:
    last, first = run_ranks(_both_ways, 2, count)
    assert last == [(DATA, bits([made(spec, i) for spec in USUAL])) for i in range(count)] + [2, 2]
    empty, full = (NOTHING, []), [(DATA, bits([made(USUAL[0], i)])) for i in range(count)]
    assert first == [empty if i % 3 == 1 else full[i] for i in range(count)] + [2, 2]
