"""What an optimizer subtracts per unit of learning rate, against the steps of torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_eff.functional.staleness.directions import adam_direction, nadam_direction
from lightning_eff.functional.staleness.mitigation import predict_weight
from tests.functional.staleness.losses import nonlinear

BETAS = pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


@BETAS
def test_the_direction_of_adam_is_what_the_last_step_took(betas: tuple[float, float]) -> None:
    weight = parameter()
    optimizer = torch.optim.Adam([weight], lr=0.01, betas=betas, eps=1e-6)
    for step in range(1, 20):
        before = weight.detach().clone()
        weight.grad = nonlinear(before)
        optimizer.step()
        state: dict[str, Any] = optimizer.state[weight]
        found = adam_direction(state["exp_avg"], state["exp_avg_sq"], step, betas=betas, eps=1e-6)
        torch.testing.assert_close(
            predict_weight(before, found, lr=0.01, horizon=1), weight.detach(), rtol=0, atol=1e-15
        )
    assert not adam_direction(before, before, 0, betas=betas, eps=1e-6).any()


@BETAS
@pytest.mark.parametrize("psi", [4e-3, 0.0, 0.5])
def test_the_direction_of_nadam_is_what_every_step_of_equal_gradients_takes(
    betas: tuple[float, float], psi: float
) -> None:
    weight = parameter()
    optimizer = torch.optim.NAdam([weight], lr=0.01, betas=betas, eps=1e-6, momentum_decay=psi)
    grad, farthest = weight.detach() * 3, 0.0
    for step in range(1, 20):
        before, weight.grad = weight.detach().clone(), grad
        optimizer.step()
        state: dict[str, Any] = optimizer.state[weight]
        options: dict[str, Any] = {"betas": betas, "eps": 1e-6}
        moments = state["exp_avg"], state["exp_avg_sq"], step
        found = nadam_direction(*moments, **options, momentum_decay=psi, mu_product=float(state["mu_product"]))
        took = (before - weight.detach()) / 0.01
        torch.testing.assert_close(found, took, rtol=3e-7, atol=0)  # torch keeps mu_product in float32
        plain = adam_direction(*moments, **options)
        farthest = max(farthest, float((plain / took - 1).abs().max()))
    assert farthest > 0.05  # Adam's direction is another
    nothing = nadam_direction(before, before, 0, **options, momentum_decay=psi, mu_product=1.0)
    assert not nothing.any()


def test_the_direction_of_nadam_is_nearer_to_its_steps_than_adams() -> None:
    """Of gradients that change: the newest is not in the state, the mean stands for it."""
    weight, far, near = parameter(), 0.0, 0.0
    optimizer = torch.optim.NAdam([weight], lr=0.01)
    generator = torch.Generator().manual_seed(2)
    for step in range(1, 20):
        before = weight.detach().clone()
        weight.grad = before + 0.2 * torch.randn(50, generator=generator, dtype=torch.float64)
        optimizer.step()
        state: dict[str, Any] = optimizer.state[weight]
        options: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
        moments, mu = (state["exp_avg"], state["exp_avg_sq"], step), float(state["mu_product"])
        took = (before - weight.detach()) / 0.01
        near += float((nadam_direction(*moments, **options, momentum_decay=4e-3, mu_product=mu) - took).norm())
        far += float((adam_direction(*moments, **options) - took).norm())
    assert near < far
