"""precision="fp8-fit" and "fp6-fit": each layer's gradient format follows its own gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.errors import ConfigurationError
from lightning_eff.functional import fp8_quantize
from lightning_eff.functional.numerics.float_format import FloatFormat, quantize
from lightning_eff.functional.numerics.lognormal import SHIFT, best_format, lognormal_fit
from lightning_eff.precision import FittedPrecision
from lightning_eff.precision.formats.fitted import E2M3, FittedOptions, _due
from lightning_eff.precision.formats.history import advance
from lightning_eff.precision.layers.convert import convert
from tests.precision.closeness import close
from tests.precision.models import task, trainer

CPU = torch.device("cpu")


def converted(layer: nn.Module, **options: Any) -> Any:
    (state,) = convert(nn.Sequential(layer), FittedOptions(exempt_first_last=False, **options)).states.values()
    return state


def lognormal(octaves: float, *shape: int) -> Tensor:
    """Numbers around 2^-20 whose log2 has this standard deviation."""
    return torch.randn(shape).sign() * torch.exp2(torch.randn(shape) * octaves - 20)


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("octaves", [0.5, 1.5, 3.0, 5.0])
def test_the_split_is_the_best_for_the_spread(bits: int, octaves: float, seed: int) -> None:
    layer = nn.Linear(32, 256, bias=False)
    state = converted(layer, bits=bits)
    layer(torch.randn(256, 32)).backward(lognormal(octaves, 256, 256))
    chosen, expected = state.histories["grad"].estimate.format, best_format(bits, octaves)
    assert (chosen.exponent_bits, chosen.mantissa_bits) == (expected.exponent_bits, expected.mantissa_bits)


@pytest.mark.parametrize("scale", ["max", "mean"])
@pytest.mark.parametrize("bits", [8, 6])
def test_products_are_those_of_the_rounded_operands(bits: int, scale: str, seed: int) -> None:
    layer, x = nn.Linear(48, 32, bias=False), torch.randn(20, 48, requires_grad=True)
    converted(layer, bits=bits, scale=scale)
    y, grad = layer(x), lognormal(2.0, 20, 32)
    y.backward(grad)
    fit = lognormal_fit(grad)
    fmt = best_format(bits, fit.sigma_log2).scaled(round(fit.mu / math.log(2)) + SHIFT)
    if scale == "max":
        base = best_format(bits, fit.sigma_log2)
        top = grad.abs().max().item()
        (fmt,) = [f for f in map(base.scaled, range(-60, 60)) if f.max >= top > f.max / 2]

    def forward_codes(t: Tensor) -> Tensor:
        if bits == 8:
            return fp8_quantize(t.detach())
        step = t.detach().abs().max() / E2M3.max
        return quantize(t.detach() / step, E2M3) * step

    close(y.detach(), forward_codes(x) @ forward_codes(layer.weight).T, 48)
    close(x.grad, quantize(grad, fmt) @ forward_codes(layer.weight), 32)
    close(layer.weight.grad, quantize(grad, fmt).T @ forward_codes(x), 20)


def test_a_format_reaches_the_largest_gradient_and_saturates_where_it_is_placed_by_the_mean(seed: int) -> None:
    for scale, reaches in (("max", True), ("mean", False)):
        layer, grad = nn.Linear(8, 64, bias=False), lognormal(1.0, 64, 64)
        grad[0, 0] = 1.0  # twenty octaves above the rest
        state = converted(layer, bits=6, scale=scale)
        codes = state.encode_grad(grad).to_input.codes.float()
        assert (codes[0, 0] > 0.9) == reaches
        assert codes.count_nonzero() >= (1 if reaches else 3900)


def test_fits_are_often_at_first_and_rare_later() -> None:
    assert [step for step in range(350) if _due(step, 100)] == [0, 1, 2, 4, 8, 16, 32, 64, 100, 200, 300]


def test_the_format_of_a_step_is_that_of_the_fit_before_it(seed: int) -> None:
    layer = nn.Linear(8, 64, bias=False)
    state = converted(layer, refit_every_n_steps=4)
    splits = []
    for step, octaves in enumerate((0.5, 5.0, 5.0, 5.0, 0.5, 5.0, 5.0)):
        state.step = step
        before = state.histories["grad"].estimate.format
        state.encode_grad(lognormal(octaves, 256, 64))
        if step:
            assert state.histories["grad"].estimate.format == before
        advance(list(state.histories.values()), CPU)
        splits.append(state.histories["grad"].estimate.format.exponent_bits)
    narrow, wide = best_format(8, 0.5).exponent_bits, best_format(8, 5.0).exponent_bits
    assert splits == [narrow, wide, wide, wide, narrow, narrow, narrow]


def test_zero_gradients_are_no_fit_and_stay_zero() -> None:
    layer = nn.Linear(8, 8)
    state = converted(layer)
    layer(torch.randn(4, 8)).backward(torch.zeros(4, 8))
    assert not state.histories["grad"].estimate.fitted
    assert not layer.weight.grad.any()
    layer(torch.randn(4, 8)).backward(torch.ones(4, 8))
    assert state.histories["grad"].estimate.fitted


def test_stochastic_rounding_is_unbiased(seed: int) -> None:
    layer, grad = nn.Linear(8, 16, bias=False), lognormal(1.5, 64, 16)
    state = converted(layer, bits=6, gradient_rounding="stochastic")
    draws = torch.stack([state.encode_grad(grad).to_input.codes.float() for _ in range(2000)])
    fmt: FloatFormat = state.histories["grad"].estimate.format
    deviation = draws.double().var(0).sum().sqrt() / 2000**0.5
    assert (draws.double().mean(0) - grad).norm() < 1.5 * deviation
    assert len(draws[:, 0, 0].unique()) <= 2
    assert fmt.bits == 6
    state = converted(nn.Linear(8, 16, bias=False), bits=6)
    biased = state.encode_grad(grad).to_input.codes.double()
    assert (biased - grad).norm() > 3 * deviation, "negative control: rounding to nearest is biased"


def test_the_formats_are_told_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    plugin = FittedPrecision(bits=6)
    chosen: dict[str, str] = {}
    model = task(on_train_end=lambda self: chosen.update(plugin.chosen()))
    trainer(plugins=[plugin]).fit(model)
    printed = capsys.readouterr().out
    assert set(chosen) == {"net.2", "net.4"}
    assert all(sum(map(int, split.split("-"))) == 6 for split in chosen.values())
    for name, split in chosen.items():
        assert any(name in line and split in line for line in printed.splitlines())


@pytest.mark.parametrize(
    "options", [{"bits": 7}, {"refit_every_n_steps": 0}, {"scale": "median"}, {"gradient_rounding": "down"}]
)
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        FittedPrecision(**options)
