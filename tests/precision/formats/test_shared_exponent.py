"""precision="dfp16" and "flexpoint16": products of int16, stored results, predicted exponents, 16-bit weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_eff import LowPrecision
from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.numerics.dfp16 import dfp_quantize
from lightning_eff.functional.numerics.flexpoint import Autoflex, autoflex_init, flex_quantize
from lightning_eff.precision import DFP16Precision, FlexpointPrecision
from lightning_eff.precision.flexpoint import SECOND_MOMENTS
from lightning_eff.precision.formats.history import advance
from lightning_eff.precision.formats.shared_exponent import DFP16Options, FlexpointOptions
from lightning_eff.precision.layers.convert import convert
from tests.precision.models import parameters_of, task, trainer

CPU = torch.device("cpu")
PRODUCTS = pytest.mark.parametrize("products", ["emulated", "native"])
LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(48, 32, bias=False), (20, 48)),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3, padding=1, bias=False), (3, 6, 7, 8)),
    "strided": (lambda: nn.Conv2d(6, 10, 3, stride=2, bias=False), (3, 6, 9, 8)),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3, bias=False), (3, 6, 7, 8)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 5, bias=False), (3, 6, 17)),
}


def plain(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


def products_of(layer: nn.Module, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, input gradient and weight gradient in float64."""
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    y = plain(layer, x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad.double())]


@PRODUCTS
@pytest.mark.parametrize("name", LAYERS)
def test_dfp_products_are_those_of_the_rounded_operands(name: str, products: str, seed: int) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape, requires_grad=True)
    convert(nn.Sequential(layer), DFP16Options(products=products))
    y = layer(x)
    grad = torch.randn(y.shape)
    y.backward(grad)
    expected = products_of(make(), dfp_quantize(x), dfp_quantize(layer.weight), dfp_quantize(grad))
    for ours, theirs in zip((y.detach(), x.grad, layer.weight.grad), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@PRODUCTS
def test_dfp_has_more_than_ten_times_the_accuracy_of_bfloat16(products: str, seed: int) -> None:
    layer, x = nn.Linear(512, 64, bias=False), torch.randn(64, 512)
    expected = x.double() @ layer.weight.detach().double().T
    bf16 = (x.bfloat16() @ layer.weight.detach().bfloat16().T).double()
    convert(nn.Sequential(layer), DFP16Options(products=products))
    error, theirs = ((y.double() - expected).norm() / expected.norm() for y in (layer(x).detach(), bf16))
    assert error < 3e-4
    assert 10 * error < theirs


def on_grid(x: Tensor, scale: float) -> bool:
    units = x.detach().double() / scale
    return bool((units == units.round()).all() and (units.abs() <= 2**15).all())


@PRODUCTS
@pytest.mark.parametrize("name", LAYERS)
def test_flexpoint_stores_what_it_reads_and_writes_with_predicted_exponents(
    name: str, products: str, seed: int
) -> None:
    """Over four steps, the exponent of every tensor is that of an Autoflex fed with the maxima of the steps before."""
    make, shape = LAYERS[name]
    layer = make()
    (state,) = convert(nn.Sequential(layer), FlexpointOptions(products=products)).states.values()
    flexes: dict[str, Autoflex] = {}
    for step in range(4):
        x = (torch.randn(shape) * 2**step).requires_grad_()
        layer.weight.grad = None
        y = layer(x)
        grad = torch.randn(y.shape) * 0.01
        y.backward(grad)
        roles = {"input": x, "weight": layer.weight, "grad": grad}
        for role, tensor in roles.items():
            flexes.setdefault(role, Autoflex()).initialised or flexes[role].initialise(tensor.abs().max().item())
        values = (flex_quantize(tensor.detach(), flexes[role].scale) for role, tensor in roles.items())
        expected = dict(zip(("output", "input_grad", "weight_grad"), products_of(make(), *values), strict=True))
        for (role, theirs), ours in zip(expected.items(), (y, x.grad, layer.weight.grad), strict=True):
            flexes.setdefault(role, Autoflex()).initialised or flexes[role].initialise(theirs.abs().max().item())
            scale = flexes[role].scale
            assert on_grid(ours, scale)
            limited = theirs.clamp(-(2**15) * scale, (2**15 - 1) * scale)
            assert ((ours - limited).abs() <= 0.51 * scale + 1e-5 * theirs.abs().max()).all()
        for role, tensor in {**roles, **expected}.items():
            assert state.histories[role].estimate.scale == flexes[role].scale, role
            flexes[role].update(tensor.detach().to(torch.float32).abs().max().item())
        advance(list(state.histories.values()), CPU)
        state.invalidate()


def test_flexpoint_overflows_are_counted_and_corrected(seed: int) -> None:
    layer = nn.Linear(16, 16, bias=False)
    conversion = convert(nn.Sequential(layer), FlexpointOptions(measure_every_n_steps=1))
    (state,) = conversion.states.values()
    flex = state.histories["input"].estimate
    for step, (factor, overflows) in enumerate(((1.0, 0), (1.0, 0), (100.0, 1), (100.0, 1))):
        state.measure = step == 3
        layer(torch.ones(4, 16) * factor).sum().backward()
        advance(list(state.histories.values()), CPU)
        state.invalidate()
        assert flex.overflows == overflows
    assert state.metrics["overflows"] >= 1
    assert flex.scale >= 100 / 2**15


def test_without_stored_results_the_products_are_left_as_they_are(seed: int) -> None:
    layer, x = nn.Linear(48, 32, bias=False), torch.randn(20, 48)
    (state,) = convert(nn.Sequential(layer), FlexpointOptions(store_results=False)).states.values()
    assert set(state.histories) == {"input", "weight", "grad"}
    expected = flex_quantize(x, autoflex_init(x.abs().max().item())).double()
    expected = (
        expected @ flex_quantize(layer.weight.detach(), autoflex_init(layer.weight.abs().max().item())).double().T
    )
    torch.testing.assert_close(layer(x).detach().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=["sgd", "adam"])
def test_without_float32_masters_weights_and_state_are_16_bit(make: Any, rounding: str) -> None:
    seen: list[bool] = []

    class Check(callback_class()):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            scales = trainer.precision_plugin._scales
            state = trainer.optimizers[0].state
            for name, p in pl_module.named_parameters():
                tensors = {
                    name: p,
                    **{f"{name}:{k}": v for k, v in state[p].items() if v.dim() and k not in SECOND_MOMENTS},
                }
                seen.extend(on_grid(tensor, scales[key]) for key, tensor in tensors.items())

    def configure_optimizers(self: Any) -> Any:
        options = {"momentum": 0.9} if make is torch.optim.SGD else {}
        return make(self.parameters(), lr=0.01, **options)

    model = task(configure_optimizers=configure_optimizers)
    torch.manual_seed(3)
    plugin = FlexpointPrecision(weights="flex16", weight_rounding=rounding)
    trainer(plugins=[plugin], callbacks=[Check()], max_epochs=4).fit(model)
    assert len(seen) >= 32 * 8 * 2
    assert all(seen)
    assert sum(model.losses[-8:]) < sum(model.losses[:8])


def callback_class() -> Any:
    from lightning.pytorch.callbacks import Callback

    return Callback


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_runs_without_masters_resume_exactly(rounding: str, tmp_path: Any) -> None:
    def fit(epochs: int, resume: Any = None) -> Any:
        torch.manual_seed(3 if resume is None else 4)
        model = task()
        plugin = FlexpointPrecision(weights="flex16", weight_rounding=rounding)
        runner = trainer(plugins=[plugin], max_epochs=epochs)
        runner.fit(model, ckpt_path=resume)
        return runner, model

    fit(1)[0].save_checkpoint(tmp_path / "half.ckpt")
    assert torch.equal(parameters_of(fit(2)[1]), parameters_of(fit(2, tmp_path / "half.ckpt")[1]))


def test_rounding_to_nearest_loses_small_updates_and_stochastic_rounding_keeps_them() -> None:
    """A weight of one in 16 bits has units of about 2^-13; updates of a tenth of that vanish, or arrive in the mean."""
    ends = {}
    for rounding in ("nearest", "stochastic"):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.ones(4096))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        plugin = FlexpointPrecision(weights="flex16", weight_rounding=rounding)
        for _ in range(200):
            weight.grad = torch.full_like(weight, -1e-5)
            optimizer.step()
            plugin._after_step(optimizer)
            advance(plugin.histories(), CPU)
        ends[rounding] = weight.detach().mean().item()
    assert ends["nearest"] == 1.0
    deviation = (200 * 2.0**-13 * 1e-5 / 4096) ** 0.5  # of the mean: every step adds at most units * update of variance
    assert abs(ends["stochastic"] - 1.002) < 5 * deviation


def test_written_weights_are_read_with_the_scale_they_were_written_with() -> None:
    torch.manual_seed(3)
    plugin, model = FlexpointPrecision(weights="flex16"), task()
    checked: list[bool] = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        for name, state in plugin.states().items():
            weight = self.get_submodule(name).weight
            codes = state.encode_weight(weight).forward
            checked.append(batch_idx == 0 or torch.equal(codes.dequantize(), weight.detach()))
        return loss

    model = task(training_step=training_step)
    trainer(plugins=[plugin]).fit(model)
    assert len(checked) == 8 * 4
    assert all(checked)


@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.0}, {"beta": -1.0}, {"gamma": 0.0}, {"length": 0}, {"weights": "int8"}, {"weight_rounding": "up"},
     {"store_results": 1}, {"products": "int8"}],
)  # fmt: skip
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        FlexpointPrecision(**options)


def test_the_table_names_the_products() -> None:
    assert DFP16Precision(products="emulated").options.format().native(CPU) is False
    assert DFP16Precision(products="native").options.format().native(CPU) is True
    with pytest.raises(ConfigurationError, match="'flexpoint16' has no option 'bits'"):
        trainer(callbacks=[LowPrecision("flexpoint16", {"bits": 8})]).fit(task())
