"""What stands in front of a stack of layers in a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.errors import UnsupportedCombinationError
from lightning_eff.strategies.pipelined_bp.carry import Carry, run_layers
from lightning_eff.strategies.pipelined_bp.entry import Captured, Entry
from lightning_eff.strategies.pipelined_bp.stack import Stack, find_stack
from tests.strategies.pipelined_bp.stacks import W, linears, model


def entered(stack: Stack, step: Callable[[], Any]) -> tuple[Any, list[Carry]]:
    """The result of ``step``, in which the layers run as in one process, and what they were given."""
    seen: list[Carry] = []

    def inside(carry: Carry) -> Any:
        seen.append(carry)
        return run_layers(stack.layers, carry).x

    with Entry(stack, inside):
        return step(), seen


class Walk(nn.Module):
    """Walks its blocks; ``between`` is what it does besides."""

    def __init__(self, between: str = "") -> None:
        super().__init__()
        self.between, self.blocks = between, nn.ModuleList(nn.Bilinear(W, W, W) for _ in range(3))

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        todo = {"skips": [0, 2], "stops": [0, 1], "swaps": [0, 2, 1], "repeats": [0, 1, 1, 2], "again": [0, 1, 2, 0]}
        for i in todo.get(self.between, range(3)):
            if i and self.between == "adds":
                x = x + 1
            if i and self.between == "other side":
                side = side * 2
            if i and self.between == "other keyword":
                x = self.blocks[i](x, input2=side)
                continue
            x = self.blocks[i](x, side.clone() if self.between == "same values" else side)
        return x


def test_what_enters_a_sequential_is_captured_and_the_result_is_the_same() -> None:
    net = nn.Sequential(nn.Linear(W, W), nn.Sequential(*linears(2)))
    outer, x = model(net=net), torch.randn(2, W)
    out, (carry,) = entered(find_stack(outer), lambda: net(x * 2) + 1)
    assert torch.equal(carry.x, x * 2)
    assert torch.equal(out, net(x * 2) + 1)


@pytest.mark.parametrize("between", ["", "same values"])
def test_what_enters_a_list_is_captured_with_what_stands_beside_it(between: str) -> None:
    walk, x, side = Walk(between), torch.randn(2, W), torch.randn(2, W)
    out, (carry,) = entered(find_stack(walk), lambda: walk(x, side))
    assert carry.x is x
    assert torch.equal(carry.args[0], side)
    assert torch.equal(out, walk(x, side))


@pytest.mark.parametrize(
    "between", ["adds", "other side", "other keyword", "skips", "stops", "swaps", "repeats", "again"]
)
def test_layers_that_are_not_simply_walked_are_refused(between: str) -> None:
    """A pipeline would run them one after the other, all with the first one's side arguments."""
    walk, x = Walk(between), torch.randn(2, W)
    with pytest.raises(UnsupportedCombinationError, match="layers of 'blocks'"):
        entered(find_stack(walk), lambda: walk(x, x))
    assert not any("forward" in block.__dict__ for block in walk.blocks)


def test_layers_run_twice_are_refused() -> None:
    net = nn.Sequential(*linears(2))
    with pytest.raises(UnsupportedCombinationError, match="runs the layers of 'net' more than once"):
        entered(find_stack(model(net=net)), lambda: net(net(torch.ones(1, W))))


@pytest.mark.parametrize(
    "call",
    [lambda net, x: net(), lambda net, x: net(x, x), lambda net, x: net(input=x)],
    ids=["none", "two", "keyword"],
)
def test_a_stack_takes_one_argument(call: Callable[..., Any]) -> None:
    net = nn.Sequential(*linears(2))
    with pytest.raises(UnsupportedCombinationError, match="takes one positional argument, which may be a tuple"):
        entered(find_stack(model(net=net)), lambda: call(net, torch.ones(1, W)))


@pytest.mark.parametrize("walked", [False, True])
@pytest.mark.parametrize("fault", [None, Captured, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before", "inside", "after"])
def test_afterwards_every_forward_is_what_it_was(walked: bool, fault: type[BaseException] | None, when: str) -> None:
    net = nn.ModuleList(linears(3)) if walked else nn.Sequential(*linears(3))
    stack = find_stack(model(net=net))
    first = stack.layers[0] if walked else net
    own = first.forward if walked else stack.layers[0].forward
    first.forward = own  # type: ignore[method-assign]  # somebody else's patch

    def at(moment: str) -> None:
        if fault is not None and moment == when:
            raise fault

    def inside(carry: Carry) -> Any:
        at("inside")
        return carry.x

    def step() -> None:
        at("before")
        x = torch.ones(1, W)
        for layer in stack.layers if walked else [net]:
            x = layer(x)
        at("after")

    if fault is None:
        with Entry(stack, inside):
            step()
    else:
        with pytest.raises(fault), Entry(stack, inside):
            step()
    assert first.__dict__["forward"] is own
    assert not any("forward" in module.__dict__ for module in net.modules() if module is not first)


def test_a_layers_own_forward_runs_as_it_would() -> None:
    walk, x = Walk(), torch.randn(2, W)
    walk.blocks[0].forward = lambda x, side: x + side  # type: ignore[method-assign]
    before = walk(x, x)
    out, _ = entered(find_stack(walk), lambda: walk(x, x))
    assert torch.equal(out, before)
