"""The layers of a model to cut: which are found, and what stands in front of them in a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError
from lightning_eff.strategies.pipelined_bp.carry import Carry, Form, run_layers
from lightning_eff.strategies.pipelined_bp.entry import Captured, Entry
from lightning_eff.strategies.pipelined_bp.stack import Stack, find_stack

W = 4


def linears(count: int) -> list[nn.Module]:
    return [nn.Linear(W, W) for _ in range(count)]


def model(**children: nn.Module) -> nn.Module:
    made = nn.Module()
    for name, child in children.items():
        made.add_module(name, child)
    return made


class Blocks(nn.Module):
    """Runs its layers itself, and says in which order."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.a, self.b, self.c = linears(3)
        self.order = order

    def pipeline_stages(self) -> list[Any]:
        return [[self.a, self.b, self.c][i] for i in self.order]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.pipeline_stages():
            x = layer(x)
        return x


# ---------------------------------------------------------------------------------------------------- which stack


def hooked() -> nn.Module:
    inner = nn.Sequential(*linears(2))
    inner.register_forward_hook(lambda *_: None)
    return inner


def hooked_backward() -> nn.Module:
    inner = nn.Sequential(*linears(2))
    inner.register_full_backward_pre_hook(lambda *_: None)
    return inner


def patched() -> nn.Module:
    inner = nn.Sequential(*linears(2))
    inner.forward = lambda x: x  # type: ignore[method-assign]
    return inner


class Scaled(nn.Sequential):
    """Its layers alone are not what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("inner", "names"),
    [
        (lambda: nn.Sequential(*linears(2)), ["net.0", "net.1.0", "net.1.1", "net.2"]),
        (lambda: nn.Sequential(nn.Sequential(*linears(2))), ["net.0", "net.1.0.0", "net.1.0.1", "net.2"]),
        (hooked, ["net.0", "net.1", "net.2"]),
        (hooked_backward, ["net.0", "net.1", "net.2"]),
        (patched, ["net.0", "net.1", "net.2"]),
        (lambda: Scaled(*linears(2)), ["net.0", "net.1", "net.2"]),
        (nn.Sequential, ["net.0", "net.1", "net.2"]),
        (lambda: nn.ModuleList(linears(2)), ["net.0", "net.1", "net.2"]),
    ],
    ids=["nested", "twice", "hooked", "hooked backward", "patched", "subclass", "empty", "list"],
)
def test_a_sequential_is_its_layers_and_one_inside_it_too(inner: Callable[[], nn.Module], names: list[str]) -> None:
    outer = model(net=nn.Sequential(nn.Linear(W, W), inner(), nn.Linear(W, W)))
    stack = find_stack(outer)
    assert list(stack.names) == names
    assert list(stack.layers) == [outer.get_submodule(name) for name in names]
    assert (stack.name, stack.walked) == ("net", False)


@pytest.mark.parametrize("kind", [nn.Sequential, lambda *layers: nn.ModuleList(layers)], ids=["sequential", "list"])
def test_a_layer_that_stands_there_twice_runs_twice(kind: Callable[..., nn.Module]) -> None:
    a, b, act = *linears(2), nn.Tanh()
    stack = find_stack(model(net=kind(a, act, b, act)))
    assert list(stack.layers) == [a, act, b, act]
    assert stack.names == ("net.0", "net.1", "net.2", "net.3")


def test_blocks_of_a_list_stay_whole() -> None:
    stack = find_stack(model(blocks=nn.ModuleList([nn.Sequential(*linears(2)), nn.Linear(W, W)])))
    assert stack.names == ("blocks.0", "blocks.1")
    assert stack.walked


@pytest.mark.parametrize("where", ["itself", "inside"])
def test_a_module_may_say_what_its_layers_are(where: str) -> None:
    own = Blocks(2, 0, 1)
    stack = find_stack(own if where == "itself" else model(deep=model(net=own)))
    prefix = "" if where == "itself" else "deep.net."
    assert stack.names == (prefix + "c", prefix + "a", prefix + "b")
    assert stack.name == prefix.rstrip(".")
    assert not stack.walked


def test_it_may_only_name_its_own() -> None:
    own = Blocks(0, 1)
    own.pipeline_stages = lambda: [own.a, nn.Linear(W, W), "b"]  # type: ignore[method-assign]
    with pytest.raises(
        ConfigurationError, match=r"net\.pipeline_stages\(\) .* it returned \['Linear', 'Linear', 'str'\]"
    ):
        find_stack(model(net=own))


def test_the_one_with_most_of_the_parameters_is_obvious() -> None:
    two = model(small=nn.Sequential(*linears(3)), large=nn.Sequential(*(nn.Linear(32, 32) for _ in range(3))))
    assert find_stack(two).name == "large"


def test_the_one_with_enough_layers_is_obvious() -> None:
    two = model(short=nn.Sequential(nn.Linear(64, 64), nn.Tanh()), long=nn.Sequential(*linears(4)))
    assert find_stack(two, stages=3).name == "long"


def test_otherwise_the_candidates_are_told() -> None:
    two = model(encoder=nn.Sequential(*linears(3)), decoder=nn.Sequential(*linears(3)), head=nn.Linear(W, W))
    told = (
        r"no single stack .* encoder \(3 layers, 43% of the parameters\), decoder \(3 layers, 43% .*module='net.blocks'"
    )
    with pytest.raises(ConfigurationError, match=told):
        find_stack(two, stages=2)
    assert find_stack(two, "decoder", stages=2).name == "decoder"


@pytest.mark.parametrize(
    ("name", "stages", "told"),
    [
        (None, 2, "none at all"),
        ("net", 2, r"'net' is not a module of this model\. Did you mean 'nets'\?"),
        ("head", 2, "module='head' is a Linear; it has to be"),
        ("nets", 4, r"'nets' has 3 layers \(nets\.0, nets\.1, nets\.2\) and cannot be cut into 4 stages"),
        ("nets.1", 1, "module='nets.1' is a Linear"),
    ],
)
def test_what_cannot_be_cut_is_told(name: str | None, stages: int, told: str) -> None:
    given = (
        model(head=nn.Linear(W, W)) if name is None else model(nets=nn.Sequential(*linears(3)), head=nn.Linear(W, W))
    )
    with pytest.raises(ConfigurationError, match=told):
        find_stack(given, name, stages=stages)


@pytest.mark.parametrize("name", [None, "net"])
@pytest.mark.parametrize("changed", ["subclass", "instance"])
def test_a_sequential_with_a_forward_of_its_own_is_no_stack(name: str | None, changed: str) -> None:
    """Its layers one after the other are not what it computes, and nobody would notice."""
    net = Scaled(*linears(3)) if changed == "subclass" else nn.Sequential(*linears(3))
    if changed == "instance":
        net.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match="pipeline_stages"):
        find_stack(model(net=net), name, stages=2)


# ---------------------------------------------------------------------------------------------------- the entry


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


def test_a_form_knows_tensors_from_the_rest() -> None:
    x, mask = torch.ones(2), torch.zeros(2, dtype=torch.bool)
    form = Form.of(Carry((x, {"mask": mask, "scale": 2}), (None,), {"causal": True}))
    other = Carry((torch.ones(5), {"mask": mask, "scale": 2}), (None,), {"causal": True})
    assert form.tensors(other) == [other.x[0], mask]  # another shape is fine
    assert form.carry([x, mask]).x == (x, {"mask": mask, "scale": 2})
    for changed in (
        other._replace(kwargs={"causal": False}),
        other._replace(args=()),
        other._replace(x=(x, {"mask": None, "scale": 2})),
        other._replace(x=x),
    ):
        with pytest.raises(UnsupportedCombinationError, match="has changed since the first batch"):
            form.tensors(changed)
