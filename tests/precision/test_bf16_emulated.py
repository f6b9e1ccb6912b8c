"""precision="bf16-emulated": operands and results rounded to bfloat16, everything else float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_eff.functional import bf16_round
from lightning_eff.precision.config import BF16EmulatedConfig
from lightning_eff.precision.convert import convert
from tests.precision.models import task, trainer

BF16 = 2.0**-8


def test_products_are_those_of_the_rounded_operands(seed: int) -> None:
    layer, x = nn.Linear(48, 32), torch.randn(20, 48, requires_grad=True)
    convert(nn.Sequential(layer), BF16EmulatedConfig())
    y, grad = layer(x), torch.randn(20, 32)
    y.backward(grad)
    xq, wq, gq = (t.detach().bfloat16().double() for t in (x, layer.weight, grad))
    bias = layer.bias.detach()
    for ours, theirs, roundings in (
        (y.detach(), xq @ wq.T + bias, 2),  # the sum, then with the bias added
        (x.grad, gq @ wq, 1),
        (layer.weight.grad, gq.T @ xq, 1),
    ):
        assert ours is not None
        assert ours.dtype == torch.float32
        assert ((ours - theirs).abs() <= roundings * BF16 * theirs.abs() + BF16 * (bias.abs().max() + 1e-3)).all()
    assert torch.equal(y.detach(), bf16_round(y.detach()))
    assert torch.equal(x.grad, bf16_round(x.grad))
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


def test_inputs_that_are_bfloat16_numbers_give_exact_products() -> None:
    """Small integers: nothing is rounded anywhere, so the result is that of float32."""
    layer, x = nn.Conv2d(4, 8, 3, bias=False), torch.randint(-3, 4, (2, 4, 6, 6)).float().requires_grad_()
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-2, 3, layer.weight.shape))
    plain = layer(x)
    expected = torch.autograd.grad(plain.sum(), [x, layer.weight])
    convert(nn.Sequential(layer), BF16EmulatedConfig())
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
