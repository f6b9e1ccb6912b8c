"""No kernel follows a global setting: same bits under every default, precision, mode and number of threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_eff.functional.codes import Codes
from lightning_eff.functional.numerics.float_format import FloatFormat
from lightning_eff.functional.numerics.fp8 import FP8_E4M3, FP8_E5M2
from lightning_eff.kernels import bf16, float_format, fp8, fp8_rows, int16, products, pruning, quantize, relu
from lightning_eff.kernels import shared_exponent as shared
from lightning_eff.kernels.convolution import conv_forward, conv_input_grad, conv_weight_grad
from lightning_eff.kernels.geometry import Geometry
from tests.kernels.worlds import AUTOCAST, DEVICE, DTYPES, GRADIENTS, MEMORY, PRODUCTS, THREADS, same_everywhere

F32, HALF = torch.float32, torch.bfloat16
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(260, 140, generator=GENERATOR)  # more than a kernel leaves to one thread
SCALE = torch.tensor(2.0**-13)
FORMAT = FloatFormat(4, 3)


def integers(dtype: torch.dtype, *shape: int) -> Tensor:
    top = 32767 if dtype == torch.int16 else 15
    return torch.randint(-top, top + 1, shape, generator=GENERATOR).to(dtype)


MATRICES = {dtype: (integers(dtype, 50, 3000), integers(dtype, 3000, 40)) for dtype in (torch.int8, torch.int16)}
VALUES = X.to(HALF), X.t().contiguous().to(HALF)
GEOMETRIES = {
    "plain": Geometry((1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1)),
    "strided": Geometry((1, 3, 3), (1, 2, 2), (0, 1, 1), (1, 1, 1)),
    "grouped": Geometry((1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1), 4),
}


def convolutions(dtype: torch.dtype, name: str, native: bool) -> Callable[[], Any]:
    geometry, size = GEOMETRIES[name], (1, 9, 8)
    x = Codes(integers(dtype, 5, *size, 8), torch.tensor(0.5))
    w = Codes(integers(dtype, 12, 9, 8 // geometry.groups), torch.tensor(0.25))
    grad = Codes(integers(dtype, 5, *geometry.out_size(size), 12), torch.tensor(2.0))
    return lambda: [
        conv_forward(x, w, geometry, native=native, bias=X[0, :12]),
        conv_input_grad(grad, w, geometry, size, native=native),
        conv_weight_grad(grad, x, geometry, native=native),
    ]


def written(write: Callable[..., Any], *dtypes: torch.dtype) -> Callable[[], Any]:
    """What ``write`` makes of copies of X in these dtypes."""

    def compute() -> Any:
        made = [(X * 100).to(dtype) for dtype in dtypes]
        return write(*made), made

    return compute


def sgd(update: Any) -> Callable[[], Any]:
    rule, kept = bf16.SGDRule(lr=0.1, momentum=0.9, weight_decay=0.01), {"kahan": [HALF], "split": [torch.int16]}

    def step(weight: Tensor, grad: Tensor, buffer: Tensor, *beside: Tensor) -> Any:
        return bf16.sgd_step(rule, weight, *(beside or (None,)), grad, buffer, update=update, seed=5)

    return written(step, HALF, HALF, F32, *kept.get(update, []))


KERNELS: dict[str, Callable[[], Any]] = {
    "largest_magnitude": lambda: quantize.largest_magnitude(X),
    "fingerprint": lambda: quantize.fingerprint(X),
    "sawb": lambda: quantize.sawb_encode(X, pack=True),
    "sawb unsigned": lambda: quantize.sawb_encode(X.abs(), unsigned="mirror5"),
    "sawb known scale": lambda: quantize.sawb_encode(X, scale=SCALE.double()),
    "unpack": lambda: quantize.unpack_int4(X.view(torch.uint8).reshape(-1), 999),
    "luq": lambda: quantize.luq_codes(X, seed=7, observed=None),
    "luq of a number": lambda: quantize.luq_codes(X, seed=7, max_abs=0.1),
    "luq drawn": lambda: (torch.manual_seed(1), quantize.luq_codes(X))[1],
    "luq levels 8": lambda: quantize.luq_codes(X, seed=7, levels=8, max_abs=0.1),
    "fp8": lambda: fp8.fp8_encode(X, FP8_E4M3, keep=True),
    "fp8 delayed": lambda: fp8.fp8_encode(X, FP8_E5M2, max_abs=0.1),
    "fp8 decode": lambda: fp8.fp8_decode(X.to(FP8_E4M3)),
    "fp8 rows": lambda: fp8_rows.fp8_encode_along(X, FP8_E4M3, 1, keep=True),
    "fp8 both": lambda: fp8_rows.fp8_encode_both(X, FP8_E4M3),
    "float format": lambda: float_format.quantize(X, FORMAT, rounding="stochastic", seed=3),
    "float format codes": lambda: float_format.encode(X, FORMAT),
    "prune": lambda: pruning.stochastic_prune(X, 0.1, seed=3),
    "prune half": lambda: pruning.stochastic_prune(X.to(HALF), 0.1, seed=3),
    "prune float64": lambda: pruning.stochastic_prune(X.double(), 0.1, seed=3),
    "relu": lambda: (mask := relu.relu_mask(X)) and (*mask, relu.apply_mask(X, mask[1], X.stride())),
    "dfp": lambda: shared.dfp_encode(X),
    "integers": lambda: shared.integer_encode(X, SCALE, rounding="stochastic", seed=3),
    "round to scale": written(lambda x: shared.round_to_scale_(x, SCALE), F32),
    "bf16 sr": written(lambda w, x: bf16.write_stochastic(w, x, 9), HALF, F32),
    "bf16 kahan": written(bf16.write_kahan, HALF, HALF, F32),
    "bf16 split": written(bf16.write_split, HALF, torch.int16, F32),
    "bf16 join": written(bf16.join_fp32, HALF, torch.int16),
    **{f"sgd {update}": sgd(update) for update in ("sr", "kahan", "split")},
    "int16 product": lambda: int16.int16_product(*MATRICES[torch.int16]),
    "rescale": lambda: products.rescale(X, SCALE, SCALE, bias=X[0].double(), dtype=HALF),
    "rescale rows": lambda: products.rescale(X, X[:, :1].contiguous(), SCALE),
    "product of values": lambda: products.code_product(*VALUES, native=False),
    "product of values in float32": lambda: products.code_product(VALUES[0].float(), VALUES[1], native=False),
    **{
        f"product {dtype} {native}": lambda dtype=dtype, native=native: products.scaled_product(
            *(Codes(codes, SCALE) for codes in MATRICES[dtype]), native=native, bias=X[0, :40]
        )
        for dtype in (torch.int8, torch.int16)
        for native in (True, False)
    },
    **{
        f"convolution {name} {dtype} {native}": convolutions(dtype, name, native)
        for name in GEOMETRIES
        for dtype in (torch.int8, torch.int16)
        for native in (True, False)
    },
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_follows_no_global(name: str) -> None:
    worlds = (DTYPES, DEVICE, PRODUCTS, AUTOCAST, MEMORY, GRADIENTS, THREADS)
    assert same_everywhere(KERNELS[name], *worlds) == []


@pytest.mark.parametrize("name", KERNELS)
def test_neither_does_its_replacement_in_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith(("relu", "fingerprint")):
        pytest.skip("there is none, or not for these numbers")
    monkeypatch.setattr("lightning_eff.kernels.operands.library", lambda: None)
    assert same_everywhere(KERNELS[name], DTYPES, DEVICE, PRODUCTS, AUTOCAST, MEMORY, GRADIENTS) == []


def test_the_probe_of_the_sgd_kernel_is_made_in_float32() -> None:
    """It runs at the first step of a process, perhaps in Lightning's forward context: there it wrote past its end."""
    kernels = bf16.kernels_for()
    if kernels is None:
        pytest.skip("no compiled kernels here")
    assert same_everywhere(lambda: bf16.rounds_like_torch.__wrapped__(kernels), DTYPES, DEVICE) == []
    assert bf16.rounds_like_torch(kernels)


@pytest.mark.parametrize(
    "world",
    [
        "torch.set_default_dtype(torch.bfloat16)",
        pytest.param("torch.set_default_device('meta')", marks=pytest.mark.long),
    ],
)
def test_importing_the_package_in_another_world_changes_nothing(world: str) -> None:
    """Constants that kernels read are made when modules are imported: in Lightning, anywhere."""
    code = f"""
import torch
{world}
from lightning_eff.kernels.quantize import sawb_encode
x = torch.arange(-8, 8, dtype=torch.float32, device="cpu") / 3
print(sawb_encode(x)[0].codes.tolist())
"""
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    x = torch.arange(-8, 8, dtype=torch.float32) / 3
    assert there.stdout.strip() == str(quantize.sawb_encode(x)[0].codes.tolist())
