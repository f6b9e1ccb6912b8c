"""The largest curvature against eigenvalues of known Hessians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_eff.errors import ConfigurationError, NonFiniteGradientError
from lightning_eff.functional.staleness.curvature import top_curvature


def quadratic(eigenvalues: list[float], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    n = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    hessian = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    return hessian.to(dtype), torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    "eigenvalues",
    [[5.0, 2.0, 1.0, 0.1], [5.0, -2.0, 1.0], [2.0, -5.0, 1.0], [5.0, -5.0, 1.0], [5.0, 4.9, -4.95], [-3.0, -1.0, -2.0]],
    ids=str,
)
def test_the_curvature_of_a_quadratic(eigenvalues: list[float]) -> None:
    hessian, weights = quadratic(eigenvalues)
    for at in (weights, 0 * weights, 1e6 * weights):
        found = top_curvature(lambda w: hessian @ w - 3, at, iterations=300, tolerance=1e-8)
        assert found == pytest.approx(max(eigenvalues), rel=1e-3 if -5.0 in eigenvalues else 1e-4)
    float32, weights = quadratic(eigenvalues, torch.float32)
    assert top_curvature(lambda w: float32 @ w, weights, iterations=300) == pytest.approx(max(eigenvalues), rel=0.02)


def test_curvature_of_any_shape_and_of_none() -> None:
    weights = torch.ones(2, 3, dtype=torch.float64)
    assert top_curvature(lambda w: 4 * w, weights) == pytest.approx(4)
    assert top_curvature(torch.ones_like, weights) == 0
    assert torch.equal(weights, torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_curvature_of_a_small_network(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    x, y = (torch.randn(64, n, generator=generator, dtype=torch.float64) for n in (5, 2))
    weights = 0.5 * torch.randn(5 * 8 + 8 * 2, generator=generator, dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        hidden = torch.tanh(x.to(w.dtype) @ w[:40].view(5, 8))
        return (hidden @ w[40:].view(8, 2) - y.to(w.dtype)).square().mean()

    exact = float(torch.linalg.eigvalsh(torch.func.hessian(loss)(weights))[-1])
    found = top_curvature(torch.func.grad(loss), weights.to(dtype), iterations=100, tolerance=1e-5)
    assert found == pytest.approx(exact, rel=1e-3)
    assert top_curvature(torch.func.grad(loss), weights.to(dtype)) == pytest.approx(exact, rel=0.05)
    assert found == top_curvature(torch.func.grad(loss), weights.to(dtype), iterations=100, tolerance=1e-5)


def test_what_is_not_allowed() -> None:
    with pytest.raises(ConfigurationError, match="iterations=0"):
        top_curvature(lambda w: w, torch.ones(2), iterations=0)
    with pytest.raises(ConfigurationError, match="tolerance=nan"):
        top_curvature(lambda w: w, torch.ones(2), tolerance=math.nan)
    with pytest.raises(NonFiniteGradientError, match="NaN or Inf"):
        top_curvature(lambda w: w / 0, torch.ones(2))
