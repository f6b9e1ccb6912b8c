"""precision="bf16-emulated": operands and results rounded to bfloat16, everything else float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff.functional import bf16_round
from lightning_eff.precision.formats.bf16 import BF16EmulatedOptions
from lightning_eff.precision.layers.convert import convert
from tests.precision.models import task, trainer

BF16 = 2.0**-8


def test_products_are_those_of_the_rounded_operands(seed: int) -> None:
    layer, x = nn.Linear(48, 32), torch.randn(20, 48, requires_grad=True)
    convert(nn.Sequential(layer), BF16EmulatedOptions())
    y, grad = layer(x), torch.randn(20, 32)
    y.backward(grad)
    xq, wq, gq = (t.detach().bfloat16().double() for t in (x, layer.weight, grad))
    bias = layer.bias.detach()
    for ours, theirs, roundings in (
        (y.detach(), xq @ wq.T + bias, 2),  # the sum, then with the bias added
        (x.grad, gq @ wq, 1),
        (layer.weight.grad, gq.T @ xq, 2**-10),  # not rounded
    ):
        assert ours is not None
        assert ours.dtype == torch.float32
        assert ((ours - theirs).abs() <= roundings * BF16 * theirs.abs() + BF16 * (bias.abs().max() + 1e-3)).all()
    assert torch.equal(y.detach(), bf16_round(y.detach()))
    assert torch.equal(x.grad, bf16_round(x.grad))
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(48, 32), (20, 48)),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3, padding=1), (3, 6, 7, 8)),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3), (3, 6, 7, 8)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 5), (3, 6, 17)),
    "conv3d": (lambda: nn.Conv3d(4, 5, 3), (2, 4, 4, 5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_optimizer_reads_the_float32_sum_of_a_weight_gradient(name: str, seed: int) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    weight = bf16_round(layer.weight.detach()).double().requires_grad_()
    y = torch.func.functional_call(layer, {"weight": weight, "bias": layer.bias.double()}, (bf16_round(x).double(),))
    grad = torch.randn(y.shape)
    y.backward(bf16_round(grad).double())
    convert(nn.Sequential(layer), BF16EmulatedOptions())
    layer(x).backward(grad)
    assert layer.weight.grad is not None
    assert weight.grad is not None
    assert (layer.weight.grad - weight.grad).norm() <= 1e-6 * weight.grad.norm()
    assert not torch.equal(layer.weight.grad, bf16_round(layer.weight.grad))


def test_inputs_that_are_bfloat16_numbers_give_exact_products() -> None:
    """Small integers: nothing is rounded anywhere, so the result is that of float32."""
    layer, x = nn.Conv2d(4, 8, 3, bias=False), torch.randint(-3, 4, (2, 4, 6, 6)).float().requires_grad_()
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-2, 3, layer.weight.shape))
    plain = layer(x)
    expected = torch.autograd.grad(plain.sum(), [x, layer.weight])
    convert(nn.Sequential(layer), BF16EmulatedOptions())
    y = layer(x)
    assert torch.equal(y, plain)
    for ours, theirs in zip(torch.autograd.grad(y.sum(), [x, layer.weight]), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_every_layer_is_converted_and_masters_are_float32(capsys: pytest.CaptureFixture[str]) -> None:
    model = task()
    runner = trainer(precision="bf16-emulated")
    runner.fit(model)
    assert "4 of 4 layers" in capsys.readouterr().out
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert not torch.equal(model.net[2].weight, bf16_round(model.net[2].weight.detach()))
