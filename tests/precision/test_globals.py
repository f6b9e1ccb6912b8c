"""A converted layer's step follows no global setting, and no product is left to the precision torch is set to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_eff.precision.formats.base import LayerOptions
from lightning_eff.precision.formats.bf16 import BF16EmulatedOptions
from lightning_eff.precision.formats.fitted import FittedOptions
from lightning_eff.precision.formats.fp8 import FP8Options
from lightning_eff.precision.formats.history import advance
from lightning_eff.precision.formats.luq import LUQOptions
from lightning_eff.precision.formats.shared_exponent import DFP16Options, FlexpointOptions
from lightning_eff.precision.layers.convert import convert
from lightning_eff.runtime.seeds import SeedStream
from tests.kernels.worlds import DEVICE, DTYPES, GRADIENTS, MEMORY, PRODUCTS, THREADS, same_everywhere

CPU = torch.device("cpu")
ALL = {"exempt_first_last": False}
INTEGERS: dict[str, LayerOptions] = {
    "luq4": LUQOptions(products="native", **ALL),
    "luq4 emulated": LUQOptions(products="emulated", samples=2, hindsight=0.9, **ALL),
    "luq4 levels 8": LUQOptions(levels=8, **ALL),
    "dfp16": DFP16Options(products="native"),
    "dfp16 emulated": DFP16Options(products="emulated"),
    "flexpoint16": FlexpointOptions(products="native"),
    "flexpoint16 emulated": FlexpointOptions(products="emulated"),
}
METHODS: dict[str, LayerOptions] = INTEGERS | {
    "fp8": FP8Options(filter_slow=False, **ALL),
    "fp8-rowwise": FP8Options(scaling="rowwise", filter_slow=False, **ALL),
    "fp8-delayed": FP8Options(scaling="delayed", filter_slow=False, **ALL),
    "fp8-fit": FittedOptions(**ALL),
    "fp6-fit": FittedOptions(bits=6, gradient_rounding="stochastic", **ALL),
    "bf16-emulated": BF16EmulatedOptions(),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(130, 70), (300, 130)),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3, padding=1), (7, 6, 30, 30)),
    "strided": (lambda: nn.Conv2d(6, 10, 3, stride=2), (3, 6, 19, 8)),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3), (3, 6, 7, 8)),
    "pointwise": (lambda: nn.Conv2d(20, 30, 1), (3, 20, 17, 16)),  # torch makes a matrix product of it
    "conv1d": (lambda: nn.Conv1d(6, 10, 5), (3, 6, 17)),
    "attention": (lambda: nn.MultiheadAttention(16, 2, batch_first=True), (3, 5, 16)),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)


def step_of(
    config: LayerOptions, name: str, *, steps: int = 2, backward: bool = True, products_alone: bool = False
) -> Callable[[], Any]:
    """Outputs, gradients, figures and what the layer learned, of a few steps with inputs made here and now."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    weights = make().state_dict()
    xs = [torch.randn(shape) for _ in range(steps)]
    with torch.device("cpu"):
        grads = torch.randn(100_000)

    def compute() -> Any:
        with torch.device("cpu"), torch.inference_mode(False):
            layer = make().to(torch.float32)
            layer.load_state_dict(weights)
        conversion = convert(nn.Sequential(layer), config, SeedStream(5), CPU)
        results: list[Any] = []
        for data in xs:
            x = data.detach().clone().requires_grad_(backward)
            for state in conversion.states.values():
                state.measure = True
            y = layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)
            results.append(y.detach())
            if backward:
                layer.zero_grad()
                y.backward(grads[: y.numel()].view(y.shape))
                results += [x.grad, *(p.grad for p in layer.parameters() if p.dim() > 1 or not products_alone)]
            histories = [history for state in conversion.states.values() for history in state.histories.values()]
            advance(histories, CPU)
            for state in conversion.states.values():
                results.append({} if products_alone else dict(state.metrics))
                state.invalidate()
        return results

    return compute


@every_layer
@pytest.mark.parametrize("method", METHODS)
def test_a_layers_step_follows_no_global(method: str, layer: str) -> None:
    if layer == "attention" and method not in ("luq4", "fp8"):
        pytest.skip("its scores are the user's, in the user's precision; its projections are linear layers")
    assert same_everywhere(step_of(METHODS[method], layer), DTYPES, DEVICE, PRODUCTS, MEMORY) == []


@every_layer
@pytest.mark.parametrize("method", INTEGERS)
def test_sums_of_integers_do_not_follow_the_number_of_threads(method: str, layer: str) -> None:
    """Those of values, the gradient of a bias and the logged figures are torch's own float32 sums, which do."""
    assert same_everywhere(step_of(METHODS[method], layer, products_alone=True), THREADS) == []


@every_layer
@pytest.mark.parametrize("method", METHODS)
def test_an_output_is_the_same_in_every_gradient_mode(method: str, layer: str) -> None:
    compute = step_of(METHODS[method], layer, steps=1, backward=False)
    assert same_everywhere(compute, GRADIENTS) == []


class Operands(TorchDispatchMode):
    """Whether torch multiplied float32 numbers that bfloat16 or TF32 would round."""

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "linear")

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.rounded: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.PRODUCTS:
            read = [x for x in args if isinstance(x, Tensor)]
            if name == "convolution_backward":  # of the operand it makes the gradient of it reads the shape
                read = [x for x, made in zip(args[:3], (False, *args[-1][:2]), strict=True) if not made]
            self.products += 1
            for x in read:
                if x.dtype == torch.float32 and not torch.equal(x, x.to(torch.bfloat16).to(torch.float32)):
                    self.rounded.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "attention"])
@pytest.mark.parametrize("method", METHODS)
def test_no_product_multiplies_numbers_that_a_lower_precision_would_round(method: str, layer: str) -> None:
    """The mechanism: set_float32_matmul_precision, allow_tf32 and their successors, on any device, change nothing.

    Operands are float64, or exact in bfloat16 (and so in TF32, which has more bits).
    """
    compute = step_of(METHODS[method], layer, steps=1)
    with Operands() as seen:
        compute()
    assert seen.rounded == []
    if method in ("luq4 emulated", "dfp16 emulated", "flexpoint16 emulated", "bf16-emulated", "fp8", "fp8-fit"):
        assert seen.products >= 3
    plain = LAYERS[layer][0]()
    with Operands() as seen:  # the control: torch's own layer does
        plain(torch.randn(LAYERS[layer][1])).sum().backward()
    assert seen.rounded


def test_halves_are_integers_that_bfloat16_holds_and_add_up() -> None:
    """Of which the products off the CPU are made, and all grouped convolutions."""
    from lightning_eff.kernels.int16 import halves

    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    parts = halves(codes)
    assert torch.equal(sum(factor * part.double() for factor, part in parts), codes.double())
    for _, part in parts:
        assert part.dtype == torch.float32
        assert part.abs().max() <= 128
        assert torch.equal(part, part.to(torch.bfloat16).to(torch.float32))
