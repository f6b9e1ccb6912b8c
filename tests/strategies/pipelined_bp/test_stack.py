"""The layers of a model to cut: which are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from lightning_eff.errors import ConfigurationError
from lightning_eff.strategies.pipelined_bp.stack import find_stack
from tests.strategies.pipelined_bp.stacks import W, linears, model


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
