"""Messages between two stages: what is sent arrives, whatever its size, and at the end nothing is left under way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_eff.errors import UnsupportedCombinationError
from lightning_eff.runtime.ranks import find_on_rank_0
from lightning_eff.runtime.rng import broadcast_generators
from lightning_eff.strategies.pipelined_bp.channel import _DTYPES, ALIGNMENT, DATA, NOTHING, Channel, Message
from lightning_eff.strategies.pipelined_bp.consolidate import Consolidation
from lightning_eff.strategies.pipelined_bp.partition import Partition
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


# ---------------------------------------------------------------------------------------------------- values

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


# ---------------------------------------------------------------------------------------------------- the end


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


# ---------------------------------------------------------------------------------------------------- all together


class Replaces(nn.Module):
    """Puts another tensor in the place of a buffer, as running averages are often written."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("average", torch.zeros(2))

    def step(self, value: float) -> None:
        self.average = 0 * self.average + value
        with torch.no_grad():
            self.linear.weight.fill_(value)


def _bring_together(rank: int, world: int) -> Any:
    model = nn.ModuleList([Replaces(), Replaces()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        optimizer.state[p] = {"momentum_buffer": torch.full_like(p, float(rank))}
    owners = {name: int(name[0]) for name, _ in model.named_parameters()}
    partition = Partition((0, 1), (0, 1), owners, {f"{i}.average": i for i in range(2)})
    consolidation = Consolidation(model, optimizer, partition, position=1 - rank)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4], "nothing is changed until asked for"
    consolidation.keep_own_parameters()
    trains = [len(group["params"]) for group in optimizer.param_groups]
    for module in model:
        module.step(rank + 1.0)
    consolidation.broadcast_weights()
    values = [(float(m.linear.weight.mean()), float(m.average.mean())) for m in model]
    state = consolidation.gather_optimizer_state(optimizer.state_dict())
    moments = {i: float(s["momentum_buffer"].mean()) for i, s in state["state"].items()}
    return trains, values, moments, state["param_groups"][0]["params"]


def test_what_ranks_hold_between_them_is_brought_together() -> None:
    """Stage 0 is trained on rank 1, which has made its weights and buffers 2; stage 1 on rank 0."""
    first, second = run_ranks(_bring_together, 2)
    for trains, values, _, _ in (first, second):
        assert trains == [2]
        assert values == [(2.0, 2.0), (1.0, 1.0)]
    assert first[2:] == ({0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0}, [0, 1, 2, 3])


class TwoArgumentsError(Exception):
    def __init__(self, a: str, b: str) -> None:
        super().__init__(f"{a} and {b}")


def _ask_rank_0(rank: int, world: int, kind: str) -> Any:
    class LocalError(Exception):
        pass

    def find() -> int:
        assert rank == 0, "the others are told"
        if kind == "local":
            raise LocalError("of the user's code")
        if kind == "two":
            raise TwoArgumentsError("this", "that")
        if kind == "value":
            raise ValueError("of the user's code")
        return 7

    try:
        return find_on_rank_0(find)
    except Exception as error:  # noqa: BLE001 - it is what is looked at
        return type(error).__name__, str(error)


@pytest.mark.parametrize(
    ("kind", "told_"),
    [("", 7), ("value", "of the user's code"), ("local", "of the user's code"), ("two", "this and that")],
)
def test_the_error_of_rank_0_is_everybodys(kind: str, told_: Any) -> None:
    """Also one that cannot be sent, or cannot be made again from its message."""
    first, second = run_ranks(_ask_rank_0, 2, kind)
    if kind:
        assert first == ({"value": "ValueError", "local": "LocalError", "two": "TwoArgumentsError"}[kind], told_)
        assert told_ in second[1]
    else:
        assert (first, second) == (told_, told_)


def _draw(rank: int, world: int) -> Any:
    import random

    import numpy as np

    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)  # noqa: NPY002 - what third parties draw from
    broadcast_generators()
    return float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002


def test_all_ranks_draw_what_rank_0_draws() -> None:
    first, second = run_ranks(_draw, 2)
    assert first == second
