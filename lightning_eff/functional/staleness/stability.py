"""How large a learning rate may be when gradients are late, and how fast training can then be at best.

Near a minimum, along one eigenvector of the Hessian with eigenvalue ``curvature``, delayed SGD is a linear recurrence.
With x = lr curvature its characteristic polynomial is

    p(z) = (z - 1) C(z) + x B(z)

    spike compensation (a, b), any of the two 0       C = (z - m) z^D          B = (a + b) z - m b
    the same with weight prediction LWP^v             C = (z - m) z^D          B = (T + a + b) z - (T + m b)
    the same with weight prediction LWP^w             C = (z - m) z^(D + 1)    B = [(a + b) z - m b] [(1 + T) z - T]
    shifted momentum                                  C = z^(D + 1) - m        B = z

The error shrinks as |r|^t with r the largest root; the minimum is stable while |r| < 1. Without a mitigation, a = 1 and
b = 0, the limits of x in closed form are

    D = 0: 2 (1 + m)     D = 1: 1 - m (shifted: 1 - m^2)     m = 0: 2 sin(pi / (2 (2 D + 1))), about pi / (2 D)

so that with late gradients momentum costs stability even in terms of lr / (1 - m). Shifted momentum does not: a worker
adds a gradient to the velocity of D updates ago, its own, v_{t+1} = m v_{t-D} + g_t.

Legend: D ``delay`` in updates between forward and backward, m ``momentum``; a, b of spike compensation and T of weight
prediction as in :mod:`~lightning_eff.functional.staleness.mitigation`; x the learning rate times the curvature. All
in float64.

References:
    Kosson et al., Pipelined Backpropagation at Scale, MLSys 2021, arXiv:2003.11666 (spike compensation, weight
    prediction, condition numbers). Only abstract and introduction were at hand: polynomials and figures are derived
    here and tested against the updates themselves.
    Giladi, Shpigel Nacson, Hoffer, Soudry, At Stability's Edge: How to Adjust Hyperparameters to Preserve Minima
    Selection in Asynchronous Training of Neural Networks?, ICLR 2020, arXiv:1909.12340 (stability, shifted momentum as
    in the authors' code).
Differs: the limit is found on the unit circle, by bisection in the angle at which a root crosses it, for any delay.
    Stable is meant in the mean, for a constant delay and plain SGD: noise and Adam are not covered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_eff.checks import Choice, Real, Whole, check
from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.staleness.mitigation import spike_coefficients

MitigationName = Literal["none", "nesterov", "sc", "lwp", "lwp_w", "lwp+sc", "lwp_w+sc", "shifted"]
DELAY = Whole(0, 2**16, "the search takes memory for each")
_BISECTIONS = 48
_PER_DECADE = 100
"""Learning rates per decade in the search for the best one."""


class Dynamics(NamedTuple):
    """The two polynomials of p(z) = (z - 1) C(z) + x B(z); coefficients from the highest power down.

    Attributes:
        free: C, what there is without a gradient.
        driven: B, how the gradient acts.
    """

    free: tuple[float, ...]
    driven: tuple[float, ...]

    def coefficients(self, x: Tensor | float) -> Tensor:
        """Return the coefficients of p for every x; float64, (...) -> (..., degree + 1)."""
        free = torch.tensor([*self.free, 0.0], dtype=torch.float64, device="cpu")
        free[1:] -= torch.tensor(self.free, dtype=torch.float64, device="cpu")  # times z, less itself
        driven = torch.zeros_like(free)
        driven[-len(self.driven) :] = torch.tensor(self.driven, dtype=torch.float64, device="cpu")
        # (z - 1) C + x B
        return free + torch.as_tensor(x, dtype=torch.float64, device="cpu").unsqueeze(-1) * driven


class Optimum(NamedTuple):
    """The best that a method can do for curvatures between 1 / kappa and 1.

    Attributes:
        half_life: updates in which the slowest error halves.
        lr: the learning rate for it, times the largest curvature.
        momentum: the momentum for it.
    """

    half_life: float
    lr: float
    momentum: float


def momentum_dynamics(
    delay: int, momentum: float, *, a: float = 1.0, b: float = 0.0, horizon: float = 0.0, by_weights: bool = False
) -> Dynamics:
    """Return p of momentum with spike compensation (a, b) and weight prediction (LWP^w if ``by_weights``).

    Example:
        >>> momentum_dynamics(1, 0.5)
        Dynamics(free=(1.0, -0.5, 0.0), driven=(1.0, 0.0))
    """
    free = (1.0, -momentum, *[0.0] * delay)  # C = (z - m) z^D
    if not by_weights:
        return Dynamics(free, (horizon + a + b, 0 - horizon - momentum * b))  # B = (T + a + b) z - (T + m b)
    ahead, behind = 1 + horizon, 0 - horizon  # (1 + T) z - T
    first, second = a + b, 0 - momentum * b  # (a + b) z - m b
    # C = (z - m) z^(D + 1); B is the product of the last two
    return Dynamics((*free, 0.0), (first * ahead, first * behind + second * ahead, second * behind))


def shifted_dynamics(delay: int, momentum: float) -> Dynamics:
    """Return p of shifted momentum: z^(D+2) - z^(D+1) + (x - m) z + m; D = 0 is ordinary momentum.

    Example:
        >>> shifted_dynamics(1, 0.5)
        Dynamics(free=(1.0, 0.0, -0.5), driven=(1.0, 0.0))
    """
    return Dynamics((1.0, *[0.0] * delay, -momentum), (1.0, 0.0))  # C = z^(D + 1) - m, B = z


def dynamics(delay: int, momentum: float, mitigation: MitigationName = "none") -> Dynamics:
    """Return the polynomials of a method by name.

    Args:
        delay: D, 0 or more.
        momentum: m, 0 .. 1, below 1.
        mitigation: ``"none"``, ``"nesterov"`` (as without delay), ``"sc"`` (SC_D), ``"lwp"`` (LWP^v, T = D),
            ``"lwp_w"`` (LWP^w; the same without SC), ``"lwp+sc"``, ``"lwp_w+sc"`` or ``"shifted"`` (shifted momentum).

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> dynamics(2, 0.5, "sc")
        Dynamics(free=(1.0, -0.5, 0.0, 0.0), driven=(1.75, -0.75))
    """
    mitigation = check("mitigation", mitigation, Choice(*get_args(MitigationName)))
    delay = check("delay", delay, DELAY)
    momentum = check("momentum", momentum, Real(0, 1, below=True))
    if mitigation == "shifted":
        return shifted_dynamics(delay, momentum)
    spike = 1 if mitigation == "nesterov" else delay if mitigation.endswith("sc") else 0
    a, b = spike_coefficients(momentum, spike)
    horizon = delay if mitigation.startswith("lwp") else 0
    return momentum_dynamics(delay, momentum, a=a, b=b, horizon=horizon, by_weights=mitigation.startswith("lwp_w"))


def largest_roots(coefficients: Tensor) -> Tensor:
    """Return the modulus of every polynomial's largest root, from its companion matrix: (..., n + 1) -> (...).

    Args:
        coefficients: from the highest power, which is not 0, down; real.
    """
    # The companion matrix of z^n + c_1 z^(n-1) + .. + c_n: -c in the first row, ones below the diagonal.
    tail = coefficients.to(torch.float64)[..., 1:] / coefficients[..., :1]
    companion = torch.diag_embed(torch.ones_like(tail[..., 1:]), offset=-1)
    companion[..., 0, :] = -tail
    moduli: Tensor = torch.linalg.eigvals(companion).abs()
    return moduli.amax(-1)


def largest_root(coefficients: Sequence[float] | Tensor) -> float:
    """Return the modulus of the largest root of one polynomial, coefficients from the highest power down.

    Raises:
        ConfigurationError: the polynomial has no root.

    Example:
        >>> round(largest_root([1.0, -2.5, 1.0]), 12)  # (z - 2) (z - 1/2)
        2.0
    """
    given = torch.as_tensor(coefficients, dtype=torch.float64, device="cpu")
    if given.dim() != 1 or len(given) < 2 or not bool(given[0] != 0):
        raise ConfigurationError(
            f"A polynomial with a root has two coefficients or more, the first not 0; got {given.tolist()}."
        )
    return float(largest_roots(given))


def half_life(r: float) -> float:
    """Return in how many updates an error that is multiplied by r in each halves; inf if it does not shrink.

    Example:
        >>> half_life(0.5), half_life(1.0)
        (1.0, inf)
    """
    if r >= 1:
        return math.inf
    return math.log(0.5) / math.log(r) if r > 0 else 0.0  # r^t = 1/2


def max_stable_lr(curvature: float, delay: int, momentum: float, *, mitigation: MitigationName = "none") -> float:
    """Return the learning rate below which a minimum with this largest curvature is stable.

    Args:
        curvature: largest eigenvalue of the Hessian, weight decay included; above 0. It is found by
            :func:`~lightning_eff.functional.top_curvature`.
        delay: D, in updates.
        momentum: m.
        mitigation: as in :func:`dynamics`.

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> round(max_stable_lr(2.0, 0, 0.9), 9), round(max_stable_lr(2.0, 1, 0.9), 9)
        (1.9, 0.05)
    """
    curvature = check("curvature", curvature, Real(0, above=True))
    return _first_crossing(dynamics(delay, momentum, mitigation)) / curvature


def _first_crossing(system: Dynamics) -> float:
    """The least x > 0 that puts a root on the unit circle: x(angle) = -(z - 1) C / B is real there.

    For x just above 0 all roots are inside: those of C are, and 1 moves inwards. As coefficients are real, the upper
    half of the circle is enough.
    """
    low, high = _sign_changes(system)
    sign = _on_circle(system, low).imag.sign()
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        same = _on_circle(system, middle).imag.sign() == sign
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    # At z = -1 every x is real.
    angles = torch.cat([(low + high) / 2, torch.tensor([math.pi], dtype=torch.float64, device="cpu")])
    found = _on_circle(system, angles).real
    return float(found[found > 0].min())


def _sign_changes(system: Dynamics) -> tuple[Tensor, Tensor]:
    """Intervals of angles, each with one crossing: fine enough for z^D, and for angles near 0 if m is near 1."""
    degree = len(system.free)
    angles = torch.cat([
        torch.logspace(-7, 0, 700, dtype=torch.float64, device="cpu") * (math.pi / degree),
        torch.linspace(0, math.pi, 64 * degree + 1, dtype=torch.float64, device="cpu")[1:-1],
    ])  # fmt: skip
    angles = angles.sort().values
    signs = _on_circle(system, angles).imag.sign()
    change = (signs[1:] != signs[:-1]).nonzero().squeeze(-1)
    return angles[change], angles[change + 1]


def _on_circle(system: Dynamics, angles: Tensor) -> Tensor:
    """The x that makes exp(i angle) a root; complex."""
    # z - 1 without cancellation near 1
    z_less_1 = torch.polar(2 * (angles / 2).sin(), (angles + math.pi) / 2)  # 2 sin(angle / 2) i exp(i angle / 2)
    # p(z) = 0 for x = -(z - 1) C(z) / B(z)
    return -z_less_1 * _polynomial(system.free, angles) / _polynomial(system.driven, angles)


def _polynomial(coefficients: tuple[float, ...], angles: Tensor) -> Tensor:
    """Its values at exp(i angle); almost all coefficients are 0."""
    one = torch.ones_like(angles)
    powers = range(len(coefficients) - 1, -1, -1)
    terms = [c * torch.polar(one, k * angles) for c, k in zip(coefficients, powers, strict=True) if c]
    return torch.stack(terms).sum(0)


def scaled_lr(lr: float, delay_from: int, delay_to: int, momentum: float, *, kind: MitigationName = "none") -> float:
    """Return the learning rate that keeps the same minima stable with another delay (arXiv:1909.12340).

    It is scaled as the limit is: for long delays by ``delay_from / delay_to``. The rule keeps the ratio to the limit;
    it does not promise that training from a random start converges, and assumes the same batch size.

    Args:
        lr: right for ``delay_from``.
        delay_from: in updates; 0 for synchronous training.
        delay_to: in updates.
        momentum: m, in both.
        kind: the mitigation, in both; as in :func:`dynamics`.

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> round(scaled_lr(0.1, 0, 16, 0.0), 6)
        0.004758
    """
    limits = [max_stable_lr(1.0, delay, momentum, mitigation=kind) for delay in (delay_to, delay_from)]
    return lr * (limits[0] / limits[1])  # lr' = lr limit(D') / limit(D)


def best_half_life(condition_number: float, delay: int, method: MitigationName = "none") -> Optimum:
    """Return the best (lr, momentum) for curvatures from 1 / ``condition_number`` to 1, and what it gives.

    A search over a grid, twice refined around its best momentum: good to about 3 %, in seconds for delays up to 16.

    Args:
        condition_number: kappa, 1 or more.
        delay: D, in updates.
        method: the mitigation, as in :func:`dynamics`.

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> [round(best_half_life(100, 1, method).half_life) for method in ("none", "sc", "lwp+sc")]
        [70, 26, 14]
    """
    condition_number = check("condition_number", condition_number, Real(1))
    # Momenta are tried by the logarithm of 1 - m; at the optimum without delay it is -1.2 decades for kappa = 1000.
    decades, width = torch.linspace(0, 4, 25, dtype=torch.float32, device="cpu").tolist(), 4 / 24
    best = Optimum(math.inf, 0.0, 0.0)
    for _ in range(3):
        found = [_best_lr(condition_number, delay, 1 - 10**-decade, method) for decade in decades]
        best = min([best, *found])
        centre = -math.log10(1 - best.momentum)
        decades = [max(0.0, centre + width * offset / 4) for offset in range(-4, 5)]
        width /= 4
    return best


def _best_lr(condition_number: float, delay: int, momentum: float, method: MitigationName) -> Optimum:
    """The best learning rate for one momentum: of all windows [x / kappa, x] the one with the least largest root."""
    system = dynamics(delay, momentum, method)
    width = max(1, math.ceil(math.log10(condition_number) * _PER_DECADE))
    exponents = torch.arange(-width - 2 * _PER_DECADE, 1, dtype=torch.float64, device="cpu") / width
    # The window spans the condition number exactly; two decades of learning rates up to the limit are tried.
    x = _first_crossing(system) * max(condition_number, 10 ** (1 / _PER_DECADE)) ** exponents
    slowest = largest_roots(system.coefficients(x)).unfold(0, width + 1, 1).amax(-1)
    at = int(slowest.argmin())
    return Optimum(half_life(float(slowest[at])), float(x[at + width]), momentum)
