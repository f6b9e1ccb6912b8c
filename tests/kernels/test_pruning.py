"""The compiled pruning against ``functional``: bit for bit."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from lightning_eff.functional.numerics import lognormal as plain
from lightning_eff.kernels import pruning as compiled
from tests.bounds import lognormal

pytestmark = pytest.mark.usefixtures("compiled_kernels")


def check(x: Tensor, tau: float | Tensor, seed: int) -> None:
    found, zeros = compiled.stochastic_prune(x, tau, seed)
    expected = plain.stochastic_prune(x, tau, seed)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found.nan_to_num(0.25), expected.nan_to_num(0.25))
    assert torch.equal(found.isnan(), expected.isnan())
    assert int(zeros) == int((expected == 0).sum())


@pytest.mark.parametrize("size", [0, 1, 2047, 2048, 2049, 40_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sizes_dtypes_and_threads(size: int, dtype: torch.dtype, threads: int) -> None:
    x = lognormal(size).to(dtype).nan_to_num(posinf=1.0, neginf=-1.0)
    for tau in (0.0, 1e-3, 0.7, 40.0, math.nan, math.inf, torch.tensor(3.3)):
        check(x, tau, seed=2**64 - 5)


@given(seed=st.integers(0, 2**64 - 1), exponent=st.integers(-149, 120), ratio=st.floats(0.01, 100))
def test_any_float32_is_pruned_alike(seed: int, exponent: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(seed % 2**63)
    x = torch.randn(300, generator=generator, dtype=torch.float64).mul(2.0**exponent).float()
    check(x, ratio * 2.0**exponent, seed)


def test_views_special_values_and_the_global_generator() -> None:
    x = torch.randn(40, 60)
    for view in (x.t(), x[:, ::3], x[None].expand(2, 40, 60)):
        check(view, 0.9, seed=1)
    check(torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e-45, -1e-40]), 2.0, seed=3)
    torch.manual_seed(8)
    first = compiled.stochastic_prune(x, 0.9)[0]
    torch.manual_seed(8)
    assert torch.equal(plain.stochastic_prune(x, 0.9), first)
