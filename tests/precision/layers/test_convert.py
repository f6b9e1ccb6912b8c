"""Which layers are converted, why the others are not, and that everything is put back."""

from __future__ import annotations

import copy
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_eff.errors import ConfigurationError
from lightning_eff.precision.formats.luq import LUQOptions
from lightning_eff.precision.layers.convert import convert
from lightning_eff.precision.layers.twins import STATE, Twin
from tests.precision.models import ALL, body, converted, every_layer


class MyLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class MyAttention(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


REASONS: dict[str, tuple[nn.Module, str]] = {
    "embedding": (nn.Embedding(5, 4), "a table, no product"),
    "bag": (nn.EmbeddingBag(5, 4), "a table, no product"),
    "lstm": (nn.LSTM(4, 4), "LSTM has no low-precision form"),
    "subclass": (MyLinear(4, 4), "MyLinear is a subclass of Linear"),
    "attention subclass": (MyAttention(4, 2), "MyAttention is a subclass of MultiheadAttention"),
    "lazy": (nn.LazyLinear(4), "lazy: run one batch"),
    "lazy convolution": (nn.LazyConv2d(4, 3), "lazy: run one batch"),
    "parametrised": (parametrizations.weight_norm(nn.Linear(4, 4)), "parametrised"),
    "transposed": (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d has no low-precision form"),
    "bilinear": (nn.Bilinear(4, 4, 4), "Bilinear has no low-precision form"),
    "bias_k": (nn.MultiheadAttention(4, 2, add_bias_kv=True), "add_bias_kv"),
    "zero attention": (nn.MultiheadAttention(4, 2, add_zero_attn=True), "add_zero_attn"),
}


@pytest.mark.parametrize("name", list(REASONS))
def test_layers_left_alone_are_named_with_the_reason(name: str) -> None:
    layer, reason = REASONS[name]
    kind = type(layer)
    conversion = convert(nn.Sequential(layer), ALL)
    (row,) = conversion.rows
    assert (row.name, row.kind) == ("0", kind.__name__)
    assert reason in row.reason
    assert not conversion.states
    assert type(layer) is kind


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 4),
        nn.Conv1d(4, 4, 3),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv3d(4, 4, 3, padding="same", padding_mode="zeros"),
        nn.MultiheadAttention(4, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_supported_layers_are_converted_and_given_back(layer: nn.Module) -> None:
    kind, keys, before = type(layer), list(layer.state_dict()), dict(layer.__dict__)
    parameters = dict(layer.named_parameters())
    conversion = convert(nn.Sequential(layer), ALL)
    assert type(layer) is not kind
    assert isinstance(layer, kind)
    assert [row.reason for row in conversion.rows] == [""]
    assert [row.name for row in conversion.rows if not row.reason] == ["0"]
    assert list(layer.state_dict()) == keys
    assert all(layer.get_parameter(name) is parameter for name, parameter in parameters.items())
    conversion.undo()
    conversion.undo()
    assert type(layer) is kind
    assert dict(layer.__dict__) == before


def test_normalisation_and_activations_are_not_in_the_table() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.GELU(), nn.PReLU())
    assert [row.name for row in convert(model, ALL).rows] == ["0"]


def test_first_and_last_are_exempt_by_default() -> None:
    conversion = convert(body(), LUQOptions())
    assert [bool(row.reason) for row in conversion.rows] == [True, False, False, True]
    assert "the first layer" in conversion.rows[0].reason
    assert "the last layer" in conversion.rows[-1].reason
    assert "exempt_first_last=False" in conversion.rows[0].reason


def test_an_embedding_in_front_counts_as_the_first() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    assert list(convert(model, LUQOptions()).states) == ["1", "2"]
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))  # the last of those that could be converted
    assert list(convert(model, LUQOptions()).states) == []


def test_patterns() -> None:
    conversion = convert(body(), every_layer(exempt=["2", "[456]"]))
    assert list(conversion.states) == ["0"]
    assert conversion.rows[1].reason == "exempt: matches '2'"
    with pytest.raises(ConfigurationError, match=r"'\*\.head' matches no layer.*0, 2, 4, 6"):
        convert(body(), every_layer(exempt=["*.head"]))
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    assert not convert(model, every_layer(exempt=["0"])).states
    assert type(model[0].out_proj).__name__ == "NonDynamicallyQuantizableLinear"


def test_a_pattern_that_matches_nothing_changes_nothing() -> None:
    model = body()
    with pytest.raises(ConfigurationError):
        convert(model, every_layer(exempt=["0", "nothing"]))
    assert not any(STATE in module.__dict__ for module in model.modules())


def test_a_shared_module_is_converted_once_and_tied_weights_stay_tied() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 4), nn.Embedding(4, 4))
    model[4].weight = model[3].weight
    conversion = convert(model, ALL)
    assert list(conversion.states) == ["0", "3"]
    assert model[0] is model[2]
    assert model[4].weight is model[3].weight
    conversion.undo()
    assert type(shared) is nn.Linear


def test_a_model_that_is_a_layer() -> None:
    model = nn.Linear(4, 4)
    conversion = convert(model, ALL)
    assert isinstance(model, Twin)
    assert list(conversion.states) == [""]
    model(torch.randn(3, 4)).sum().backward()


def test_hooks_buffers_and_modes_are_kept() -> None:
    layer, seen = nn.Linear(4, 4).eval(), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    layer.register_buffer("mask", torch.ones(4))
    converted(nn.Sequential(layer))
    layer(torch.randn(2, 4))
    assert seen == [1]
    assert not layer.training
    assert "mask" in layer.state_dict()


def test_state_dict_moves_between_plain_and_converted() -> None:
    plain, other = body(), body()
    converted(other)
    other.load_state_dict(plain.state_dict())
    plain.load_state_dict(other.state_dict())
    assert torch.equal(plain[2].weight, other[2].weight)


@pytest.fixture
def hugging_face(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """transformers' Conv1D as it is defined there, so that the test does not need the package."""
    module = ModuleType("transformers.pytorch_utils")

    class Conv1D(nn.Module):
        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.randn(nx, nf) * 0.02)
            self.bias = nn.Parameter(torch.randn(nf))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)

    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
    module.Conv1D = Conv1D  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    return Conv1D


def test_transformers_conv1d_is_the_transposed_linear(hugging_face: type[nn.Module]) -> None:
    layer, linear = hugging_face(6, 4), nn.Linear(4, 6)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.t())
        linear.bias.copy_(layer.bias)
    keys = list(layer.state_dict())
    model, conversion = converted(nn.Sequential(layer))
    converted(nn.Sequential(linear))
    assert isinstance(layer, hugging_face)
    x = torch.randn(2, 3, 4, requires_grad=True)
    y, expected = layer(x), linear(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert layer.weight.grad.shape == (4, 6)
    assert list(layer.state_dict()) == keys
    (copied,) = copy.deepcopy(model)
    assert type(copied) is hugging_face
    conversion.undo()
    assert type(layer) is hugging_face
    assert torch.equal(layer(x), copied(x))
    torch.testing.assert_close(layer(x), torch.addmm(layer.bias, x.view(-1, 4), layer.weight).view(2, 3, 6))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_fused_encoder_path_is_refused_and_restored(activation: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation=activation)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    flags = [each.activation_relu_or_gelu for each in model.layers]
    assert all(flags)
    x = torch.randn(2, 5, 8)
    conversion = convert(model, ALL)
    with torch.no_grad():
        fused = model(x)  # torch would take the fused path here, which does not know the converted layers
    assert torch.equal(fused, model(x.requires_grad_()).detach())
    conversion.undo()
    assert [each.activation_relu_or_gelu for each in model.layers] == flags
    with torch.no_grad():
        assert not torch.equal(model(x.detach()), fused)


def test_an_encoder_whose_layers_are_left_alone_keeps_its_fused_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 1))
    convert(model, every_layer(exempt=["1.*"]))
    assert model[1].use_nested_tensor
    assert model[1].layers[0].activation_relu_or_gelu


def test_relu_keeps_its_numbers() -> None:
    model, conversion = converted(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert type(model[1]) is not nn.ReLU
    x = torch.tensor([-1.0, 0.0, -0.0, 2.0, torch.nan, torch.inf], requires_grad=True)
    y = model[1](x)
    (grad,) = torch.autograd.grad(y.nan_to_num().sum(), x)
    plain = x.detach().clone().requires_grad_()
    expected = torch.relu(plain)
    (wanted,) = torch.autograd.grad(expected.nan_to_num().sum(), plain)
    torch.testing.assert_close((y, grad), (expected, wanted), rtol=0, atol=0, equal_nan=True)
    conversion.undo()
    assert type(model[1]) is nn.ReLU
    untouched, _ = converted(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), pack_relu=False)
    assert type(untouched[1]) is nn.ReLU
