"""ReLU with one bit per element: torch's numbers, an eighth of a byte kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_eff.kernels.relu import packs
from lightning_eff.precision.formats.luq import LUQOptions
from lightning_eff.precision.layers.convert import convert
from lightning_eff.precision.layers.relu import ReLUTwin
from lightning_eff.precision.layers.twins import twin_class

SHAPES = [(1,), (7,), (8,), (2047,), (2049,), (40_001,), (3, 5, 7), (4, 8, 6, 6)]


def packed_relu(*, inplace: bool = False) -> nn.Module:
    return twin_class(ReLUTwin, nn.ReLU)(inplace=inplace)


def awkward(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape).to(dtype)
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45]).to(dtype)
    x.view(-1)[: len(special)] = special[: x.numel()]
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("inplace", [False, True])
def test_value_gradient_and_strides_are_those_of_torch(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, inplace: bool, seed: int
) -> None:
    x = awkward(shape, dtype)
    if layout == "channels_last" and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    if layout == "transposed" and x.dim() > 1:
        x = x.transpose(0, 1)
    theirs, ours = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    read, own = theirs * 1, ours * 1
    expected, result = nn.ReLU(inplace)(read), packed_relu(inplace=inplace)(own)
    assert (result is own) == (expected is read) == inplace
    assert own._version == read._version
    assert torch.equal(own.nan_to_num(), read.nan_to_num())
    grad = torch.randn(x.shape).to(dtype)
    expected.backward(grad)
    result.backward(grad)
    assert torch.equal(expected.isnan(), result.isnan())
    assert torch.equal(expected.nan_to_num(), result.nan_to_num())
    assert result.stride() == expected.stride()
    assert theirs.grad is not None
    assert ours.grad is not None
    assert torch.equal(theirs.grad, ours.grad)


def test_one_bit_per_element_is_kept() -> None:
    if not packs(torch.ones(1)):
        pytest.skip("no compiled kernels here")
    for inplace in (False, True):
        kept: list[int] = []
        x = torch.randn(64, 256, requires_grad=True) * 1
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            packed_relu(inplace=inplace)(x)
        assert kept == [64 * 256 // 8]


def test_in_place_refuses_what_torch_refuses() -> None:
    for relu in (nn.ReLU(inplace=True), packed_relu(inplace=True)):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            relu(torch.randn(8, requires_grad=True))
        y = torch.randn(8, requires_grad=True).sigmoid()  # keeps its result for backward
        relu(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_in_place_on_a_part_of_a_tensor() -> None:
    grads = []
    for relu in (nn.ReLU(inplace=True), packed_relu(inplace=True)):
        x = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
        y = x * 1
        relu(y[1:3])
        (y * torch.arange(24.0).view(4, 6)).sum().backward()
        grads += [y.detach(), x.grad]
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[3])  # type: ignore[arg-type]


def test_a_gradient_of_a_gradient_is_that_of_torch() -> None:
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(6, 6, requires_grad=True)
    found = []
    for relu in (nn.ReLU(), packed_relu()):
        (grad,) = torch.autograd.grad(relu(x @ weight).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), weight)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("pack", [True, False])
def test_conversion_swaps_the_class_and_gives_it_back(pack: bool) -> None:
    class Own(nn.ReLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), Own())
    conversion = convert(model, LUQOptions(exempt_first_last=False, pack_relu=pack))
    assert isinstance(model[1], ReLUTwin) == pack
    assert type(model[3]) is Own
    conversion.undo()
    assert type(model[1]) is nn.ReLU
    assert model[1].inplace


def test_a_model_without_converted_layers_is_left_alone() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.ReLU())
    convert(model, LUQOptions())
    assert type(model[1]) is nn.ReLU
