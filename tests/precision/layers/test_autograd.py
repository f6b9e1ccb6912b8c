"""What is kept for backward, for how long, and the company of autograd's other features."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_eff.errors import UnsupportedLayerError
from lightning_eff.kernels.build import library
from lightning_eff.precision.formats import luq as luq_format
from tests.harness import keep_globals
from tests.precision.models import converted

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16)), (64, 32)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Sigmoid(), nn.Conv2d(8, 4, 3, stride=2, bias=False)),
        (4, 4, 8, 9),
    ),
}


def saved_of(model: nn.Module, x: Tensor) -> int:
    """Bytes autograd keeps for backward, parameters not counted, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    total = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    del y
    return total


@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 64), lambda: nn.Conv2d(16, 16, 3, padding=1)])
def test_an_eighth_is_kept(make: Callable[[], nn.Module]) -> None:
    layer = make()
    x = torch.randn(32, 64) if isinstance(layer, nn.Linear) else torch.randn(4, 16, 8, 8)
    plain = saved_of(layer, x)
    _, conversion = converted(nn.Sequential(layer))
    kept = saved_of(layer, x)
    assert plain == x.numel() * 4
    assert kept == x.numel() // 2 + 8
    assert kept <= 0.15 * plain
    assert conversion.saved_bytes() == (kept, plain)


@pytest.mark.skipif(library() is None, reason="the packed ReLU needs the compiled kernels")
def test_a_network_of_relus_keeps_a_sixth() -> None:
    """Tensors shared by a ReLU and the layer behind it: four bits for one and one bit for the other."""
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.ReLU())))
    x = torch.randn(128, 64)
    plain = saved_of(model, x)
    converted(model)
    assert saved_of(model, x) <= 0.17 * plain


def test_layers_that_share_an_input_keep_it_once() -> None:
    left, right = nn.Linear(64, 64), nn.Linear(64, 64)
    model = nn.ModuleDict({"left": left, "right": right})
    model.forward = lambda x: left(x) + right(x)  # type: ignore[method-assign]
    converted(model)
    x = torch.randn(32, 64)
    assert saved_of(model, x) == x.numel() // 2 + 8
    expected = left(x.clone()), right(x.clone())
    assert torch.equal(left(x), expected[0])
    assert torch.equal(right(x), expected[1])


@pytest.mark.parametrize("write", ["in place", "data"])
def test_an_input_that_was_written_to_is_encoded_again(write: str) -> None:
    layer = nn.Linear(64, 64)
    converted(nn.Sequential(layer))
    x = torch.randn(32, 64)
    first = layer(x)
    if write == "data":
        x.data.mul_(-1)
    else:
        x.mul_(-1)
    torch.testing.assert_close(layer(x) - layer.bias, -(first - layer.bias))


@pytest.mark.parametrize("name", list(MODELS))
def test_nothing_is_kept_without_need(name: str) -> None:
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    converted(model)
    with torch.no_grad():
        assert saved_of(model, x) == 0
    frozen = model[0].requires_grad_(False)
    assert saved_of(frozen, x.clone().requires_grad_()) == 0  # dx needs the weight's codes, no input
    x.requires_grad_()
    frozen(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())


def test_codes_are_let_go_with_the_graph() -> None:
    layer = nn.Linear(64, 64)
    _, conversion = converted(nn.Sequential(layer))
    layer(torch.randn(8, 64)).sum().backward()
    conversion.states["0"].invalidate()
    assert not conversion.states["0"]._cache
    assert not conversion.states["0"].recent._entries


# ------------------------------------------------------------------------------------------------ weight codes


@pytest.fixture
def encodes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that have been encoded."""
    seen: list[tuple[int, ...]] = []
    original = luq_format.sawb_encode

    def watched(x: Tensor, **options: Any) -> Any:
        if "pack" not in options:
            seen.append(tuple(x.shape))
        return original(x, **options)

    monkeypatch.setattr(luq_format, "sawb_encode", watched)
    return seen


def test_weights_are_encoded_once_until_they_change(encodes: list[tuple[int, ...]]) -> None:
    layer, other = nn.Linear(20, 30), nn.Linear(20, 30)
    _, conversion = converted(nn.Sequential(layer))
    x = torch.randn(4, 20)

    def runs() -> int:
        encodes.clear()
        for _ in range(3):
            layer(x).sum().backward()
        return len(encodes)

    assert runs() == 1
    assert runs() == 0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.step()  # moves the version counter
    assert runs() == 1
    layer.load_state_dict(other.state_dict())
    assert runs() == 1
    with torch.no_grad():
        layer.weight[0, 0] += 1
    assert runs() == 1
    conversion.states["0"].invalidate()
    assert runs() == 1
    layer.weight.data.copy_(torch.randn(30, 20))  # behind autograd's back, as averaging callbacks write
    assert runs() == 1
    layer.weight = nn.Parameter(torch.randn(30, 20))
    assert runs() == 1


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_projections_of_attention_are_encoded_once(kind: str, encodes: list[tuple[int, ...]]) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    converted(nn.Sequential(layer))
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    for _ in range(3):
        layer(x, *((x, x) if kind == "self" else (memory, memory)))
    assert len(encodes) == (2 if kind == "self" else 4)


def test_the_forward_follows_every_change_of_the_weight() -> None:
    layer, x = nn.Linear(16, 16, bias=False), torch.randn(4, 16)
    converted(nn.Sequential(layer))
    first = layer(x)
    changes: list[Callable[[], Any]] = [
        lambda: layer.load_state_dict({"weight": -layer.weight.detach().clone()}),
        lambda: layer.weight.detach().neg_(),
        lambda: torch.nn.utils.vector_to_parameters(-layer.weight.detach().flatten(), layer.parameters()),
        lambda: layer.weight.data.mul_(-1),
        lambda: setattr(layer.weight, "data", -layer.weight.data),
    ]
    for number, change in enumerate(changes):
        change()
        assert torch.equal(layer(x), first if number % 2 else -first)


# ---------------------------------------------------------------------------------------------- double backward


@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_of_gradients_are_refused(name: str) -> None:
    make, shape = MODELS[name]
    model = make()
    converted(model)
    x = torch.randn(shape, requires_grad=True)
    with pytest.raises(UnsupportedLayerError, match=r"create_graph=True.*exempt=\['\d'\]"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


# -------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", list(MODELS))
def test_activation_checkpointing_gives_the_same_bits(name: str, reentrant: bool) -> None:
    make, shape = MODELS[name]
    model = make()
    _, conversion = converted(model)
    stream = next(iter(conversion.states.values())).seeds
    results = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        stream.seed, stream.calls = 5, 0
        model.zero_grad()
        x = torch.linspace(-1, 2, torch.Size(shape).numel()).sin().view(shape).requires_grad_()
        y = run(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())))
    assert len(results[0]) == 5 + (name == "linear")
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


# --------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("name", [*MODELS, "both"])
def test_compiled_submodules_have_no_graph_break(name: str) -> None:
    if name == "both":
        model: nn.Module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
        shape: tuple[int, ...] = (4, 3, 6, 6)
    else:
        make, shape = MODELS[name]
        model = make()
    eager = copy.deepcopy(model)
    conversions = [converted(each)[1] for each in (model, eager)]
    x = torch.randn(shape)
    with keep_globals():
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        results = []
        for run, conversion in zip((compiled, eager), conversions, strict=True):
            stream = next(iter(conversion.states.values())).seeds
            stream.seed, stream.calls = 5, 0
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad))
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)
        for found, expected in zip(model.parameters(), eager.parameters(), strict=True):
            assert torch.equal(found.grad, expected.grad)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(-1)
        model(x)  # and the compiled graph follows the weights
        assert torch.equal(compiled(x), model(x))
        torch._dynamo.reset()


def test_the_operators_pass_torchs_own_checks() -> None:
    linear, conv = nn.Linear(6, 4), nn.Conv2d(3, 4, 3, padding=1)
    _, conversion = converted(nn.ModuleList([linear, conv]))
    numbers = [1, 3, 3, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1]  # kernel, stride, padding, dilation, groups
    for layer, shape, name, geometry in (
        (linear, (5, 6), "linear", ()),
        (conv, (2, 3, 5, 6), "conv", (numbers, False)),
        (conv, (2, 3, 5, 6), "conv", (numbers, True)),
    ):
        state = conversion.states["0" if layer is linear else "1"]
        tensors = (torch.randn(shape), layer.weight.detach(), layer.bias.detach(), state.handle)
        last = (torch.float32, state.format.nibbles, state.format.saved_scales(None))
        operator = getattr(torch.ops.lightning_eff, name).default
        torch.library.opcheck(operator, (*tensors, *geometry, *last), test_utils=("test_schema", "test_faketensor"))
