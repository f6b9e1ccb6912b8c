"""Converted layers against the arithmetic written out: forward values, and gradients in the mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.kernels.quantize import sawb_quantize
from lightning_eff.precision.formats.history import advance
from lightning_eff.precision.layers.twins import STATE
from tests.bounds import bernstein, codebook, lognormal, neighbours
from tests.precision.models import converted

PRODUCTS = ["native", "emulated"]
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(13, 7), (5, 13)),
    "linear 3-d": (lambda: nn.Linear(13, 7, bias=False), (2, 5, 13)),
    "linear vector": (lambda: nn.Linear(13, 7), (13,)),
    "linear to one": (lambda: nn.Linear(13, 1), (5, 13)),
    "linear from one": (lambda: nn.Linear(1, 4), (5, 1)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=1, dilation=(2, 1)), (2, 3, 9, 8)),
    "conv2d to one": (lambda: nn.Conv2d(3, 1, 1), (2, 3, 4, 4)),
    "conv2d same": (lambda: nn.Conv2d(3, 4, (3, 4), padding="same", bias=False), (2, 3, 9, 8)),
    "conv2d valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 9, 8)),
    "conv2d reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 9, 8)),
    "conv2d circular same": (lambda: nn.Conv2d(3, 4, 4, padding="same", padding_mode="circular"), (2, 3, 9, 8)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 6, 5)),
    "conv2d unbatched": (lambda: nn.Conv2d(3, 4, 3), (3, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=(1, 0, 1)), (2, 2, 4, 5, 3)),
}


def plain(layer: Any, x: Tensor, weight: Tensor, *, bias: bool = True) -> Tensor:
    """The layer's own forward in float64, with the given weight."""
    offset = layer.bias.double() if bias and layer.bias is not None else None
    if isinstance(layer, nn.Linear):
        return F.linear(x.double(), weight.double(), offset)
    result: Tensor = layer._conv_forward(x.double(), weight.double(), offset)
    return result


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("name", list(LAYERS))
def test_forward_is_the_product_of_the_quantised_values(name: str, positive: bool, products: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    x = x.relu() + 0.01 if positive else x
    # Padding with other than zeros, and unequal padding, happens before quantisation.
    outside = name in ("conv2d same", "conv2d reflect", "conv2d circular same")
    mode = "constant" if name == "conv2d same" else getattr(layer, "padding_mode", "")
    values = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode) if outside else x
    channels = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)  # sums are taken channels-last
    values = sawb_quantize(values.movedim(channels, -1).contiguous(), unsigned="mirror5" if positive else False)
    values = values.movedim(-1, channels)
    weight = sawb_quantize(layer.weight.detach())
    run = (lambda a, b: F.conv2d(a.double(), b.double())) if outside else (lambda a, b: plain(layer, a, b, bias=False))
    expected, size = run(values, weight), run(values.abs(), weight.abs())
    if layer.bias is not None:
        bias = layer.bias.detach().double()
        bias = bias if isinstance(layer, nn.Linear) else bias.view(-1, *(1,) * len(layer.kernel_size))
        expected, size = expected + bias, size + bias.abs()
    converted(nn.Sequential(layer), products=products)
    y = layer(x)
    assert y.shape == expected.shape
    assert y.dtype == torch.float32
    # Each operand is rounded once in the reference; scale of scales, product and sum are rounded in the layer.
    assert not (y.double() - expected).abs().gt(6 * 2.0**-24 * size).any()


@pytest.mark.parametrize("name", list(LAYERS))
def test_native_and_emulated_are_the_same_bits(name: str) -> None:
    make, shape = LAYERS[name]
    results = []
    for products in PRODUCTS:
        torch.manual_seed(4)
        layer, x = make(), torch.randn(shape, requires_grad=True)
        converted(nn.Sequential(layer), products=products, samples=2)
        y = layer(x)
        y.backward(torch.randn_like(y) * torch.randn_like(y).exp())
        results.append((y, x.grad, *(p.grad for p in layer.parameters())))
    for native, emulated in zip(*results, strict=True):
        assert native is not None
        assert torch.equal(native, emulated)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_are_unbiased_with_the_stated_variance(kind: str, samples: int, products: str, seed: int) -> None:
    """dW and dx, averaged over backward passes, are those of full precision with the same INT4 operands.

    The variance of each element follows from the quantiser's: dW = sum of q(dy) x, dx = sum of q(dy) w.
    """
    draws, rows, inputs, outputs = 600, 24, 6, 12
    layer: Any = nn.Linear(inputs, outputs) if kind == "linear" else nn.Conv2d(inputs, outputs, 1)
    x, dy = torch.randn(rows, inputs), lognormal(rows * outputs, sigma=1.0).view(rows, outputs)
    x_q, w_q = sawb_quantize(x).double(), sawb_quantize(layer.weight.detach()).double().view(outputs, inputs)
    model, conversion = converted(nn.Sequential(layer), samples=samples, products=products)
    conversion.states["0"].seeds.seed = seed
    shape = (rows, inputs) if kind == "linear" else (rows, inputs, 1, 1)
    leaf = x.view(shape).requires_grad_()
    found_w, found_x = [], []
    for _ in range(draws):
        layer.weight.grad, leaf.grad = None, None
        y = model(leaf)
        y.backward(dy.view_as(y))
        found_w.append(layer.weight.grad.double().view(outputs, inputs))
        found_x.append(leaf.grad.double().view(rows, inputs))  # type: ignore[union-attr]
    lower, upper = neighbours(dy.abs(), codebook(7, float(dy.abs().max())))
    below, above = dy.abs().double() - lower, upper - dy.abs().double()
    variance, spread = below * above, torch.maximum(below, above)
    fourth = variance * (above.square() - variance + below.square()) - 3 * variance.square()  # fourth cumulant
    comparisons = 2 * (2 * outputs * inputs + 2 * rows * inputs + 4)  # two seeds
    for found, expected, terms, factors, mean_of in (
        (found_w, dy.double().t() @ x_q, lambda t: t.t(), x_q, samples),
        (found_x, dy.double() @ w_q, lambda t: t, w_q, 1),
    ):
        error = torch.stack(found) - expected
        var = terms(variance) @ factors.square() / mean_of
        largest = (terms(spread)[:, :, None] * factors.abs()).amax(1) / mean_of
        rounding = expected.abs().max() * 2.0**-20  # float32 scales and sums, far below the noise
        assert not error.mean(0).abs().gt(bernstein(var, largest, draws, comparisons) + rounding).any()
        # The variance, over the first column: its elements do not depend on each other.
        var, factor = var[:, 0], factors[:, 0]
        ratio = (error[..., 0].square().mean(0) / var).mean()
        spread_of_squares = (terms(fourth) @ factor**4 / mean_of**3 + 2 * var.square()) / var.square()
        limit = ((terms(spread) @ factor.abs()).square() / var).max()
        bound = bernstein(spread_of_squares.mean(), limit, draws * var.numel(), comparisons)
        assert abs(float(ratio) - 1) < bound < 0.8  # with one sample in place of two the ratio is two


def test_bias_gradient_is_exact() -> None:
    layer = nn.Linear(5, 4)
    converted(nn.Sequential(layer))
    dy = torch.randn(9, 4)
    layer(torch.randn(9, 5)).backward(dy)
    torch.testing.assert_close(layer.bias.grad, dy.sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rounding", ["luq", "nearest"])
def test_rounding_option_reaches_the_layer(rounding: str) -> None:
    grads = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = nn.Linear(5, 4)
        x, dy = torch.randn(9, 5), torch.randn(9, 4)
        _, conversion = converted(nn.Sequential(layer), gradient_rounding=rounding)
        conversion.states["0"].seeds.seed = len(grads)
        layer(x).backward(dy)
        grads.append(layer.weight.grad)
    assert torch.equal(*grads) == (rounding == "nearest")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d depthwise"])
def test_other_dtypes_and_autocast(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    layer = make().to(dtype)
    converted(nn.Sequential(layer))
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert x.grad is not None
    assert {x.grad.dtype, layer.weight.grad.dtype, layer.bias.grad.dtype} == {dtype}
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.detach().float().requires_grad_())
        assert y.dtype == torch.bfloat16
        (y.float() ** 2).sum().backward()


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_empty_and_strided_batches(name: str) -> None:
    make, shape = LAYERS[name]
    layer = make()
    converted(nn.Sequential(layer))
    empty = torch.randn(0, *shape[1:], requires_grad=True)
    layer(empty).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == empty.shape
    assert not layer.weight.grad.any()
    x = torch.randn(shape)
    turned = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(layer(turned), layer(x))
    row = torch.randn(1, *shape[1:])
    torch.testing.assert_close(layer(row.expand(64, *shape[1:])), layer(row).expand(64, *layer(row).shape[1:]))


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_non_finite_gradients_stay_visible(name: str) -> None:
    make, shape = LAYERS[name]
    for bad in (torch.nan, torch.inf):
        for options in ({}, {"hindsight": 0.5}, {"levels": 8, "hindsight": 0.5}, {"samples": 2}):
            layer, x = make(), torch.randn(shape, requires_grad=True)
            converted(nn.Sequential(layer), **options)
            layer(x).sum().backward()
            histories = list(layer.__dict__[STATE].histories.values())
            advance(histories, torch.device("cpu"))
            before = [history.estimate.value for history in histories]
            layer.weight.grad, x.grad = None, None
            y = layer(x)
            dy = torch.ones_like(y)
            dy[-1, -1] = bad
            y.backward(dy)
            assert layer.weight.grad.isnan().all()
            assert x.grad is not None
            assert x.grad.isnan().all()
            advance(histories, torch.device("cpu"))
            assert [history.estimate.value for history in histories] == before
            assert all(math.isfinite(value) for value in before)


def test_non_finite_inputs_stay_visible() -> None:
    layer = nn.Linear(4, 4)
    converted(nn.Sequential(layer))
    x = torch.randn(3, 4)
    x[1, 1] = torch.inf
    assert layer(x).isnan().all()


def test_fine_tuning_phase_quantises_the_weight_alone() -> None:
    for make, shape in (LAYERS["linear"], LAYERS["conv2d"]):
        layer, x = make(), torch.randn(shape, requires_grad=True)
        weight = sawb_quantize(layer.weight.detach())
        expected = plain(layer, x, weight).float()
        _, conversion = converted(nn.Sequential(layer))
        conversion.states["0"].weights_only = True
        y = layer(x)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        leaf = weight.requires_grad_()
        (dw,) = torch.autograd.grad(plain(layer, x, leaf).float().square().sum(), leaf)
        torch.testing.assert_close(layer.weight.grad, dw, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("write", [lambda y: y.relu_(), lambda y: y.mul_(2.0)], ids=["relu_", "mul_"])
@pytest.mark.parametrize(
    "name", ["linear", "linear 3-d", "linear vector", "conv1d", "conv2d", "conv2d to one", "conv3d"]
)
def test_the_output_may_be_written_to_in_place(name: str, write: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model, conversion = converted(nn.Sequential(make()))
    (state,) = conversion.states.values()
    x, found = torch.randn(shape, requires_grad=True), []
    for prepare in (Tensor.clone, lambda y: y):
        state.seeds.calls, x.grad = 0, None
        y = write(prepare(model(x)))
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    (expected, expected_grad), (result, grad) = found
    assert torch.equal(result, expected)
    assert torch.equal(grad, expected_grad)
