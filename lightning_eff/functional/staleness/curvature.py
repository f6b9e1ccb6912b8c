"""The largest curvature of a loss at given weights: what the stability of late gradients is measured against.

A product of the Hessian with a unit vector u needs gradients alone,

    H u = [g(w + h u) - g(w - h u)] / (2 h) + O(h^2),     h = eps^(1/3) |w|,

and power iteration u <- H u / |H u| finds the eigenvector whose eigenvalue lambda = u' H u has the largest modulus.

Legend: w ``weights``, g ``gradient``, H the Hessian, u a unit vector, rho = |H u| the largest modulus, eps that of the
dtype.

References:
    Power method; Golub, Van Loan, Matrix Computations, 4th ed. 2013, section 7.3 (from memory).
Differs: a second, shifted iteration finds the largest eigenvalue where the largest modulus is a negative one's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_eff.checks import Real, Whole, check
from lightning_eff.errors import NonFiniteGradientError


def top_curvature(
    gradient: Callable[[Tensor], Tensor],
    weights: Tensor,
    *,
    iterations: int = 20,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> float:
    """Return the largest eigenvalue of the Hessian by power iteration, without a second backward pass.

    A product of the Hessian with a unit vector u is the central difference [g(w + h u) - g(w - h u)] / (2 h) with
    h = eps^(1/3) |w| (eps of the dtype; |w| = 1 if all weights are 0): rounding and truncation are then of like order,
    a relative error of some 1e-4 in float32 and 1e-9 in float64 where the gradient is smooth. Two gradients per
    iteration, and a few copies of the weights.

    The first run finds the largest modulus rho. Unless it belongs to a positive eigenvalue, a second run iterates with
    the Hessian plus rho, of which the largest eigenvalue is the largest in modulus as well.

    Args:
        gradient: of the same loss at any weights, in the shape of the weights; on the same data and random numbers.
        weights: w, any shape, floating dtype; not changed.
        iterations: at most so many, for each of the two runs. The result is too small where they were too few.
        seed: of the first direction, drawn on the CPU.
        tolerance: relative change of the eigenvalue that ends the iteration.

    Raises:
        ConfigurationError: ``iterations`` or ``tolerance`` is not allowed.
        NonFiniteGradientError: a gradient is not finite.

    Example:
        >>> curvatures = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
        >>> round(top_curvature(lambda w: curvatures * w, torch.ones(3, dtype=torch.float64)), 2)
        5.0
    """
    iterations = check("iterations", iterations, Whole(1))
    tolerance = check("tolerance", tolerance, Real(0))
    weights = weights.detach()
    length = torch.finfo(weights.dtype).eps ** (1 / 3) * (float(weights.norm()) or 1.0)  # h = eps^(1/3) |w|

    def product(u: Tensor) -> Tensor:
        difference = gradient(weights + length * u) - gradient(weights - length * u)
        return difference.detach().div(2 * length)  # H u = [g(w + h u) - g(w - h u)] / (2 h)

    noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed), dtype=weights.dtype, device="cpu")
    start = noise.to(weights.device)
    found, rho, u = _power_iteration(product, start, iterations, tolerance)
    if found >= (1 - tolerance) * rho:
        return found
    # A positive and a negative eigenvalue of about one modulus leave a mixture, from which it is not far to go.
    start = u if found > 0 else start
    # The largest eigenvalue of H + rho is largest in modulus, too.
    return _power_iteration(lambda u: product(u) + rho * u, start, iterations, tolerance)[0] - rho


def _power_iteration(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int, tolerance: float
) -> tuple[float, float, Tensor]:
    """Return the last u' H u, |H u| (which never shrinks) and the next u."""
    u, found, size = start / start.norm(), 0.0, 0.0
    for _ in range(iterations):
        image = product(u)
        before, found, size = size, float((u * image).sum()), float(image.norm())  # u' H u, |H u|
        if not math.isfinite(size):
            raise NonFiniteGradientError("A gradient near these weights is NaN or Inf; curvature is not defined there.")
        if size == 0:
            break
        u = image / size
        if size - before <= tolerance * size:
            break
    return found, size, u
