"""precision="fp8-rowwise" and "fp8-delayed": where scales come from, which layers are left alone, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lightning_eff.pytorch_lightning as standalone
from lightning_eff import LowPrecision
from lightning_eff.errors import ConfigurationError, NoEffectWarning
from lightning_eff.functional import fp8_quantize
from lightning_eff.functional.numerics.fp8 import FP8_E4M3, FP8_E5M2, fp8_codes
from lightning_eff.precision import FP8Precision
from lightning_eff.precision.formats.fp8 import FP8Options
from lightning_eff.precision.formats.history import advance
from lightning_eff.precision.layers.convert import convert
from tests.precision.closeness import close
from tests.precision.models import task, trainer

CPU = torch.device("cpu")


def converted(layer: nn.Module, **options: Any) -> Any:
    model = nn.Sequential(layer)
    conversion = convert(model, FP8Options(exempt_first_last=False, filter_slow=False, **options))
    (state,) = conversion.states.values()
    return model, state


@pytest.mark.parametrize("products", ["emulated", "native"])
def test_rowwise_products_are_those_of_the_cast_operands(products: str, seed: int) -> None:
    """Each operand is cast along the dimension its product sums over."""
    model, _ = converted(nn.Linear(48, 32, bias=False), scaling="rowwise", products=products)
    x, grad = torch.randn(20, 48, requires_grad=True), torch.randn(20, 32)
    y = model(x)
    y.backward(grad)
    weight = model[0].weight

    def q(t: torch.Tensor, dim: int) -> torch.Tensor:
        return fp8_quantize(t.detach(), FP8_E4M3, power_of_two=True, dim=dim)

    close(y.detach(), q(x, 1) @ q(weight, 1).T, 48)
    close(x.grad, q(grad, 1) @ q(weight, 0), 32)
    close(weight.grad, q(grad, 0).T @ q(x, 0), 20)


def test_rowwise_keeps_an_outlier_from_the_other_rows(seed: int) -> None:
    x = torch.randn(64, 128)
    x[7] *= 1e5
    errors = {}
    for scaling in ("tensorwise", "rowwise"):
        model, _ = converted(nn.Linear(128, 128, bias=False), scaling=scaling)
        expected = x @ model[0].weight.detach().T
        others = torch.arange(64) != 7
        errors[scaling] = ((model(x) - expected)[others].norm() / expected[others].norm()).item()
    assert errors["rowwise"] < 0.05
    assert errors["tensorwise"] > 5 * errors["rowwise"]


def test_rowwise_convolutions_have_one_scale_and_e4m3_gradients(seed: int) -> None:
    model, _ = converted(nn.Conv2d(8, 12, 3, bias=False), scaling="rowwise")
    x = torch.randn(4, 8, 9, 9, requires_grad=True)
    y = model(x)
    grad = torch.randn(y.shape)
    y.backward(grad)
    xq, wq, gq = (fp8_quantize(t.detach(), FP8_E4M3, power_of_two=True) for t in (x, model[0].weight, grad))
    leaf = wq.requires_grad_()
    expected = nn.functional.conv2d(xq, leaf)
    expected.backward(gq)
    close(y.detach(), expected.detach(), 72)
    close(model[0].weight.grad, leaf.grad, 4 * 49)


def test_delayed_scales_come_from_the_steps_before(seed: int) -> None:
    model, state = converted(nn.Linear(64, 32, bias=False), scaling="delayed", history=2, margin=1)
    largest: dict[str, list[float]] = {"input": [], "weight": [], "grad": []}
    for step, factor in enumerate((1.0, 4.0, 0.5, 0.25, 0.125)):
        x, grad = torch.randn(16, 64) * factor, torch.randn(16, 32) * factor
        x.requires_grad_()
        y = model(x)
        y.backward(grad)
        now = {"input": x, "weight": model[0].weight, "grad": grad}  # the first step has no other to look back on
        scales = {role: tensor.detach().abs().max().item() for role, tensor in now.items()}
        if step:
            scales = {role: 2 * max(seen[-2:]) for role, seen in largest.items()}

        def q(t: torch.Tensor, role: str, dtype: torch.dtype, scales: dict[str, float] = scales) -> torch.Tensor:
            return fp8_codes(t.detach(), dtype, max_abs=torch.tensor(scales[role])).dequantize()

        close(y.detach(), q(x, "input", FP8_E4M3) @ q(model[0].weight, "weight", FP8_E4M3).T, 64)
        close(x.grad, q(grad, "grad", FP8_E5M2) @ q(model[0].weight, "weight", FP8_E4M3), 32)
        for role, tensor in now.items():
            largest[role].append(tensor.detach().abs().max().item())
        advance(list(state.histories.values()), CPU)
        state.invalidate()


def test_a_scale_does_not_depend_on_the_tensor_it_scales(seed: int) -> None:
    model, state = converted(nn.Linear(16, 16, bias=False), scaling="delayed")
    model(torch.ones(4, 16)).sum().backward()
    advance(list(state.histories.values()), CPU)
    for value in (0.5, 1.0, 100.0):
        x = torch.full((4, 16), 0.25)
        x[0, 0] = value
        codes, _ = state.encode_input(x, lambda t: t, save=False)
        assert codes.scale == fp8_codes(torch.ones(1)).scale
        assert codes.codes[1, 1] == 112
        assert codes.codes[0, 0] == min(value, 1.0) * 448


def test_small_layers_are_left_alone_and_named() -> None:
    model = nn.ModuleDict(
        {
            "small": nn.Linear(64, 512),
            "large": nn.Linear(65, 512),
            "narrow": nn.Conv2d(16, 64, 3),
            "wide": nn.Conv2d(32, 64, 3),
        }
    )
    rows = {row.name: row.reason for row in convert(model, FP8Options(exempt_first_last=False)).rows}
    assert rows["large"] == rows["wide"] == ""
    assert rows["small"] == rows["narrow"] == "too small to get faster on cpu (filter_slow=False converts it)"


@pytest.mark.parametrize(
    ("scaling", "shape", "reason"),
    [
        ("tensorwise", (1024, 4096), "too small to get faster on cuda"),
        ("tensorwise", (1040, 4096), ""),
        ("tensorwise", (4096, 4100), "multiples of 16"),
        ("rowwise", (4096, 2048), "too small to get faster on cuda"),
        ("rowwise", (4112, 2048), ""),
        ("tensorwise", (8, 8, 3, 3), ""),
    ],
)
def test_on_a_gpu_torchaos_sizes_are_left_alone(scaling: str, shape: tuple[int, ...], reason: str) -> None:
    options: Any = {"scaling": scaling}
    found = FP8Options(**options).too_slow(shape, torch.device("cuda"))
    assert reason in found
    assert bool(found) == bool(reason)
    assert not FP8Options(filter_slow=False, **options).too_slow(shape, torch.device("cuda"))


def test_a_model_of_small_layers_is_told_so() -> None:
    with pytest.warns(NoEffectWarning, match="fp8 converted no layer .* too small to get faster"):
        trainer(precision="fp8").fit(task())


def test_string_and_option_must_agree() -> None:
    assert FP8Precision(scaling="delayed").eff_method == "fp8-delayed"
    assert standalone.FP8Precision(scaling="rowwise").info.name == "fp8-rowwise"
    with pytest.raises(ConfigurationError, match="'fp8-delayed' was asked for with scaling='rowwise'"):
        trainer(callbacks=[LowPrecision("fp8-delayed", {"scaling": "rowwise"})]).fit(task())


@pytest.mark.parametrize("options", [{"scaling": "blockwise"}, {"history": 0}, {"margin": 9}, {"filter_slow": 1}])
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        FP8Precision(**options)
