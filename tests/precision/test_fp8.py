"""precision="fp8": the products against ones written out by hand, memory, training, resume, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_eff.pytorch_lightning as standalone
from lightning_eff.errors import ConfigurationError, NonFiniteGradientError
from lightning_eff.functional import fp8_quantize
from lightning_eff.functional.numerics.fp8 import FP8_E4M3, FP8_E5M2
from lightning_eff.precision import FP8Precision
from lightning_eff.precision.formats.fp8 import FP8Options
from lightning_eff.precision.layers.convert import convert
from tests.precision.closeness import close
from tests.precision.models import parameters_of, task, trainer

CONFIG = FP8Options(exempt_first_last=False, filter_slow=False)


@pytest.fixture(autouse=True)
def _small_layers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_eff.precision.formats.fp8.SLOW_FEATURES", 0)


def test_linear_products_are_those_of_the_cast_operands(seed: int) -> None:
    layer, x = nn.Sequential(nn.Linear(48, 32)), torch.randn(20, 48, requires_grad=True)
    convert(layer, CONFIG)
    y, grad = layer(x), torch.randn(20, 32)
    y.backward(grad)
    xq, wq = fp8_quantize(x.detach(), FP8_E4M3), fp8_quantize(layer[0].weight.detach(), FP8_E4M3)
    gq = fp8_quantize(grad, FP8_E5M2)
    close(y.detach() - layer[0].bias.detach(), F.linear(xq, wq), 48)
    close(x.grad, gq @ wq, 32)
    close(layer[0].weight.grad, gq.T @ xq, 20)
    torch.testing.assert_close(layer[0].bias.grad, grad.sum(0))


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 4, "padding": 1}], ids=str)
def test_convolution_products_are_those_of_the_cast_operands(options: dict[str, Any], seed: int) -> None:
    layer, x = nn.Sequential(nn.Conv2d(8, 12, 3, bias=False, **options)), torch.randn(4, 8, 9, 7, requires_grad=True)
    convert(layer, CONFIG)
    y = layer(x)
    grad = torch.randn(y.shape)
    y.backward(grad)
    xq = fp8_quantize(x.detach(), FP8_E4M3).requires_grad_()
    wq = fp8_quantize(layer[0].weight.detach(), FP8_E4M3).requires_grad_()
    expected = F.conv2d(xq, wq, None, **options)
    expected.backward(fp8_quantize(grad, FP8_E5M2))
    close(y.detach(), expected.detach(), 72)
    assert xq.grad is not None
    assert wq.grad is not None
    close(x.grad, xq.grad, 108)
    close(layer[0].weight.grad, wq.grad, 4 * 63)


def test_a_quarter_of_float32_is_kept() -> None:
    layer = nn.Sequential(nn.Linear(64, 64))
    conversion = convert(layer, CONFIG)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        layer(torch.randn(32, 64))
    assert sum(kept) == 32 * 64 + 4
    assert conversion.saved_bytes() == (32 * 64 + 4, 32 * 64 * 4)


def test_compiled_without_a_graph_break_to_the_same_numbers() -> None:
    def run(compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
        convert(model, CONFIG)
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        x = torch.randn(4, 3, 6, 6, requires_grad=True)
        out = call(x)
        out.square().sum().backward()
        return [out.detach(), x.grad, *(p.grad for p in model.parameters())]

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp8", "fp8+bf16-mixed", "fp8+bf16-true"])
def test_training_by_string_is_repeatable_and_gives_the_types_back(precision: str) -> None:
    def run() -> torch.Tensor:
        torch.manual_seed(3)
        model = task()
        trainer(precision=precision).fit(model)
        assert all(type(layer).__module__.startswith("torch.nn") for layer in model.net)
        return parameters_of(model)

    first = run()
    assert torch.equal(first, run())
    assert first.isfinite().all()


def test_training_differs_from_float32_by_less_than_four_bits_do() -> None:
    results = []
    for precision in ("32-true", "fp8", "luq4"):
        torch.manual_seed(3)
        model = task()
        start = parameters_of(model)
        trainer(precision=precision).fit(model)
        results.append(parameters_of(model) - start)
    plain, eight, four = results
    assert 0 < (plain - eight).norm() < (plain - four).norm()


def test_resume_is_exact_and_plain_lightning_reads_the_file(tmp_path: Path) -> None:
    def fit(epochs: int, precision: str = "fp8", resume: Path | None = None) -> Any:
        torch.manual_seed(3)
        model = task()
        runner = trainer(precision=precision, max_epochs=epochs)
        runner.fit(model, ckpt_path=resume)
        return runner, model

    path = tmp_path / "half.ckpt"
    fit(1)[0].save_checkpoint(path)
    assert "FP8Precision" in torch.load(path, weights_only=True)
    whole, resumed = fit(2)[1], fit(2, resume=path)[1]
    assert torch.equal(parameters_of(whole), parameters_of(resumed))
    fit(2, precision="32-true", resume=path)


def test_a_broken_gradient_stops_before_the_parameters() -> None:
    model = task(training_step=lambda self, batch, _: self.loss(batch) * torch.nan)
    before = parameters_of(model)
    with pytest.raises(NonFiniteGradientError, match="fp8: the gradient is NaN or Inf"):
        trainer(precision="fp8").fit(model)
    assert torch.equal(parameters_of(model), before)


@pytest.mark.parametrize("options", [{"power_of_two": 1}, {"exempt": "head"}, {"on_nonfinite": "skip"}])
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        FP8Precision(**options)


def test_both_packages_have_the_class() -> None:
    assert standalone.FP8Precision.__qualname__ == FP8Precision.__qualname__ == "FP8Precision"
    assert not issubclass(standalone.FP8Precision, FP8Precision)
