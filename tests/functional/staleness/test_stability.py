"""Stability limits and half-lives against the updates themselves: their transition matrices, raised to a high power."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.staleness.mitigation import (
    extrapolate_weight,
    predict_weight,
    sgd_update,
    spike_coefficients,
)
from lightning_eff.functional.staleness.stability import (
    MitigationName,
    best_half_life,
    dynamics,
    half_life,
    largest_root,
    largest_roots,
    max_stable_lr,
    scaled_lr,
)

METHODS: tuple[MitigationName, ...] = get_args(MitigationName)
COLUMNS: tuple[MitigationName, ...] = ("none", "sc", "lwp", "lwp+sc", "lwp_w+sc")
MOMENTA = (0.5, 0.9, 0.99)
# Largest stable lr * curvature, delay -> for every momentum the columns; to half a unit of the last printed digit
LIMITS = {
    0: ("3.0/3.0/3.0/3.0/3.0", "3.8/3.8/3.8/3.8/3.8", "3.98/3.98/3.98/3.98/3.98"),
    1: (".500/.562/.500/.419/.414", ".100/.253/.270/.292/.345", ".0100/.0914/.0951/.2549/.3344"),
    2: (".281/.315/.250/.208/.207", ".0512/.1141/.1210/.1130/.1355", ".0050/.0402/.0423/.0911/.1259"),
    4: (".156/.173/.120/.104/.105", ".0265/.0483/.0494/.0405/.0477", ".0025/.0160/.0171/.0284/.0405"),
    8: (".0851/.0922/.0581/.0530/.0551", ".0139/.0207/.0194/.0148/.0166", ".0013/.0060/.0064/.0083/.0118"),
    16: (".0452/.0476/.0289/.0275/.0284", ".0075/.0096/.0077/.0060/.0064", ".0006/.0022/.0023/.0024/.0033"),
}
# a_max / (1 - m): delay -> standard at m = .5, .9, .99, shifted at the same, m = 0
EFFECTIVE = {
    1: (1.0000, 1.0000, 1.0000, 1.5000, 1.9000, 1.9900, 1.0000),
    2: (0.56155, 0.51249, 0.50125, 0.82288, 0.96629, 0.99666, 0.61803),
    4: (0.31170, 0.26498, 0.25156, 0.43173, 0.48729, 0.49875, 0.34730),
    8: (0.17010, 0.13942, 0.12662, 0.22121, 0.24469, 0.24948, 0.18454),
    16: (0.0905, 0.0749, 0.0641, 0.1120, 0.1226, 0.1248, 0.0952),
    32: (0.04699, 0.04064, 0.03281, 0.05633, 0.06137, 0.06239, 0.04833),
}
WITHOUT_MOMENTUM = {0: 2, 1: 1, 2: 0.6180340, 4: 0.3472964, 8: 0.1845367, 16: 0.0951638, 32: 0.0483275, 64: 0.0243528}
# Half-lives for (delay, condition number), columns SGDM, Nesterov, SC, LWP, LWPv+SC, LWPw+SC; from a random search with
# 600 curvatures in each trial. Without delay the first is ln(1/2) / ln((sqrt(kappa) - 1) / (sqrt(kappa) + 1)).
HALF_LIVES = {
    (0, 100): (3.454, 5.66, 3.454, 3.454, 3.454, 3.454),
    (1, 100): (69.8, 25.8, 25.8, 22.6, 13.5, 11.9),
    (1, 1000): (701, 115, 115, 107.4, 43.5, 37.9),
    (4, 100): (200.8, 200.8, 79.8, 69.3, 41.4, 34.4),
    (4, 1000): (1997, 1997, 357, 332, 132.8, 109.5),
}
HALF_LIFE_COLUMNS: tuple[MitigationName, ...] = ("none", "nesterov", "sc", "lwp", "lwp+sc", "lwp_w+sc")


def step(state: dict[str, list[Tensor]], delay: int, momentum: float, x: float, method: MitigationName) -> None:
    """One update on the loss x w^2 / 2 with learning rate 1; newest values first."""
    weights, velocities, seen = state["w"], state["v"], state["seen"]
    horizon = delay if method.startswith("lwp") else 0
    look = extrapolate_weight(weights[0], weights[1], horizon=horizon)
    if not method.startswith("lwp_w"):
        look = predict_weight(weights[0], velocities[0], lr=1.0, horizon=horizon)
    seen.insert(0, look)
    spike = 1 if method == "nesterov" else delay if method.endswith("sc") else 0
    a, b = spike_coefficients(momentum, spike)
    velocity = velocities[delay if method == "shifted" else 0]
    new = sgd_update(weights[0], velocity, x * seen[delay], lr=1.0, momentum=momentum, a=a, b=b)
    weights.insert(0, new[0])
    velocities.insert(0, new[1])
    for values in (weights, velocities, seen):
        values.pop()


def transition(delay: int, momentum: float, x: float, method: MitigationName) -> Tensor:
    """The matrix of one update, column by column: what it makes of every unit state."""
    sizes = {"w": 2, "v": delay + 1, "seen": delay + 1}
    parts = torch.eye(sum(sizes.values()), dtype=torch.float64).split(list(sizes.values()))
    state = {name: list(part) for name, part in zip(sizes, parts, strict=True)}
    step(state, delay, momentum, x, method)
    return torch.stack([row for name in sizes for row in state[name]])


def decay(delay: int, momentum: float, x: float, method: MitigationName, doublings: int = 34) -> float:
    """By what the error is multiplied in one update, from 2^34 of them."""
    power, log_norm = transition(delay, momentum, x, method), 0.0
    for _ in range(doublings):
        power = power @ power
        if not (norm := float(power.norm())):
            return 0.0
        log_norm, power = 2 * log_norm + math.log(norm), power / norm
    return math.exp(log_norm / 2**doublings)


@pytest.mark.parametrize("delay", LIMITS)
def test_the_table_of_limits(delay: int) -> None:
    for momentum, row in zip(MOMENTA, LIMITS[delay], strict=True):
        for method, printed in zip(COLUMNS, row.split("/"), strict=True):
            half_a_unit = 0.501 * 10.0 ** -len(printed.partition(".")[2])
            found = max_stable_lr(1.0, delay, momentum, mitigation=method)
            assert found == pytest.approx(float(printed), abs=half_a_unit, rel=0), (momentum, method)
            assert max_stable_lr(40.0, delay, momentum, mitigation=method) == pytest.approx(found / 40, rel=1e-12)


@pytest.mark.parametrize("delay", EFFECTIVE)
def test_the_table_of_shifted_momentum(delay: int) -> None:
    cases = [*((m, "none") for m in MOMENTA), *((m, "shifted") for m in MOMENTA), (0.0, "shifted")]
    found = [max_stable_lr(1.0, delay, m, mitigation=method) / (1 - m) for m, method in cases]
    assert found == pytest.approx(EFFECTIVE[delay], abs=5.1e-5 if delay in {1, 16} else 5.1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("delay", [0, 1, 2, 4, 8, 16, 32])
def test_the_updates_converge_below_the_limit_and_diverge_above(delay: int, method: MitigationName) -> None:
    for momentum in (0.0, *MOMENTA):
        limit = max_stable_lr(1.0, delay, momentum, mitigation=method)
        for x in torch.logspace(-3, 0, 12, dtype=torch.float64).tolist():  # the first crossing: stable all the way
            assert largest_root(dynamics(delay, momentum, method).coefficients(limit * x * (1 - 1e-3))) < 1
        assert decay(delay, momentum, limit * (1 - 1e-3), method) < 1 - 1e-7
        assert decay(delay, momentum, limit * (1 + 1e-3), method) > 1 + 1e-7


@pytest.mark.parametrize("method", METHODS)
def test_errors_in_a_plain_loop(method: MitigationName) -> None:
    """Without matrices: 4 000 updates on the limit's two sides."""
    limit = max_stable_lr(1.0, 3, 0.9, mitigation=method)
    for factor in (0.9, 1.1):
        one = torch.ones((), dtype=torch.float64)
        state = {"w": [one, one], "v": [0 * one] * 4, "seen": [one] * 4}
        for _ in range(4000):
            step(state, 3, 0.9, limit * factor, method)
        size = max(abs(float(value)) for value in state["w"] + state["seen"])
        assert (size < 0.1) if factor < 1 else (size > 10)


@given(st.integers(0, 12), st.floats(0.0, 0.99), st.floats(0.01, 1.5), st.sampled_from(METHODS))
def test_roots_are_the_decay_of_the_updates(delay: int, momentum: float, part: float, method: MitigationName) -> None:
    x = part * max_stable_lr(1.0, delay, momentum, mitigation=method)
    root = largest_root(dynamics(delay, momentum, method).coefficients(x))
    # Multiple roots are known to the root of the rounding error only.
    assert decay(delay, momentum, x, method) == pytest.approx(root, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("delay", [0, 1, 2, 4, 8, 16, 32, 64, 256, 1000])
def test_closed_forms_without_momentum(delay: int) -> None:
    sine = 2 * math.sin(math.pi / (2 * (2 * delay + 1)))
    for method in ("none", "sc", "shifted"):
        assert max_stable_lr(1.0, delay, 0.0, mitigation=method) == pytest.approx(sine, rel=1e-10)
    if delay in WITHOUT_MOMENTUM:
        assert sine == pytest.approx(WITHOUT_MOMENTUM[delay], abs=5e-8)


@given(st.floats(0.0, 0.999))
def test_closed_forms_for_short_delays(m: float) -> None:
    for method in METHODS:
        without = 2 * (1 + m) / (1 + 2 * m) if method == "nesterov" else 2 * (1 + m)
        assert max_stable_lr(1.0, 0, m, mitigation=method) == pytest.approx(without, rel=1e-10)
    assert max_stable_lr(1.0, 1, m) == pytest.approx(1 - m, rel=1e-9)
    assert max_stable_lr(1.0, 1, m, mitigation="shifted") == pytest.approx(1 - m * m, rel=1e-9)


@given(st.integers(1, 200), st.floats(0.0, 0.9999))
def test_the_closed_form_of_standard_momentum(delay: int, m: float) -> None:
    """Its angle solves tan(D t) = (1 - m) / (1 + m) cot(t / 2), and lies below pi / (2 D)."""
    low, high = 0.0, math.pi / (2 * delay)
    for _ in range(100):
        t = (low + high) / 2
        below = math.sin(delay * t) * math.sin(t / 2) * (1 + m) < math.cos(delay * t) * math.cos(t / 2) * (1 - m)
        low, high = (t, high) if below else (low, t)
    expected = math.hypot((1 + m) * 2 * math.sin(low / 2) ** 2, (1 - m) * math.sin(low))
    assert max_stable_lr(1.0, delay, m) == pytest.approx(expected, rel=1e-7)


def test_long_delays_and_heavy_momentum() -> None:
    tau = 2000
    assert max_stable_lr(1.0, tau, 0.0) * tau == pytest.approx(math.pi / 2, rel=1e-3)
    for m in (0.5, 0.9, 0.99):
        found = max_stable_lr(1.0, tau, m, mitigation="shifted") / (1 - m) * tau
        assert found == pytest.approx(math.acos(m) * math.sqrt((1 + m) / (1 - m)), rel=2e-3)
    for tau in (2, 16):
        m = 1 - 1e-9
        assert max_stable_lr(1.0, tau, m) / (1 - m) == pytest.approx(1 / tau, rel=1e-5)
        assert max_stable_lr(1.0, tau, m, mitigation="shifted") / (1 - m) == pytest.approx(2 / tau, rel=1e-5)


def test_shifted_momentum_gains_stability_and_standard_loses_it() -> None:
    for delay in (2, 16, 64):
        for method, sign in (("none", -1), ("shifted", 1)):
            limits = [sign * max_stable_lr(1.0, delay, m, mitigation=method) / (1 - m) for m in (0, 0.5, 0.9, 0.99)]
            assert limits == sorted(limits)


def test_shifted_momentum_by_hand() -> None:
    one = torch.ones((), dtype=torch.float64)
    state = {"w": [one, one], "v": [0 * one] * 3, "seen": [one] * 3}
    found = []
    for _ in range(8):  # learning rate 1, so x = 0.1
        step(state, 2, 0.9, 0.1, "shifted")
        found.append(float(state["w"][0]))
    assert found == pytest.approx([0.9, 0.8, 0.7, 0.52, 0.35, 0.19, -0.024, -0.212], abs=1e-12)


def test_shifted_momentum_is_every_worker_its_own_optimizer() -> None:
    """Round robin: D + 1 workers, each pushing the gradient at the weights it last received."""
    delay, start = 3, torch.randn(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    server = torch.nn.Parameter(start.clone())
    workers = [torch.optim.SGD([server], lr=0.05, momentum=0.9) for _ in range(delay + 1)]
    received = [start.clone() for _ in workers]
    weight, velocities, seen = start, [torch.zeros_like(start)] * (delay + 1), [start] * (delay + 1)
    for t in range(60):
        turn = t % len(workers)
        server.grad = torch.tanh(received[turn])
        workers[turn].step()
        received[turn] = server.detach().clone()
        weight, velocity = sgd_update(weight, velocities[0], torch.tanh(seen[0]), lr=0.05, momentum=0.9)
        velocities, seen = [*velocities[1:], velocity], [*seen[1:], weight]
        assert torch.equal(weight, server.detach())


@pytest.mark.parametrize("kind", METHODS)
def test_scaled_learning_rates(kind: MitigationName) -> None:
    found = [scaled_lr(0.1, 4, delay, 0.9, kind=kind) for delay in (4, 8, 16, 64, 256)]
    assert found[0] == 0.1
    assert found == sorted(found, reverse=True)
    assert scaled_lr(found[2], 16, 4, 0.9, kind=kind) == pytest.approx(0.1, rel=1e-12)


def test_scaled_learning_rates_without_momentum() -> None:
    for tau in (1, 5, 30):
        assert scaled_lr(0.3, 0, tau, 0.0) == pytest.approx(0.3 * math.sin(math.pi / (2 * (2 * tau + 1))), rel=1e-10)
    assert scaled_lr(1.0, 500, 1000, 0.0) == pytest.approx(0.5, rel=1e-3)
    assert scaled_lr(1.0, 500, 1000, 0.9, kind="shifted") == pytest.approx(0.5, rel=1e-3)


def test_roots_and_half_lives() -> None:
    assert largest_root([2.0, -4.0]) == pytest.approx(2.0)
    assert largest_root([1.0, 0.0, 4.0]) == pytest.approx(2.0)
    assert largest_roots(torch.tensor([[1.0, -3.0, 2.0], [1.0, 0.0, -9.0]])).tolist() == pytest.approx([2.0, 3.0])
    assert [half_life(r) for r in (0.0, 0.5, 0.5**0.25, 1.0, 1.5)] == pytest.approx([0.0, 1.0, 4.0, math.inf, math.inf])


def slowest(kappa: float, delay: int, momentum: float, lr: float, method: MitigationName, points: int) -> float:
    curvatures = torch.logspace(-math.log10(kappa), 0, points, dtype=torch.float64)
    return half_life(float(largest_roots(dynamics(delay, momentum, method).coefficients(lr * curvatures)).max()))


HALF_LIFE_CASES = [
    pytest.param(*case, marks=[] if case == (1, 100) else pytest.mark.long, id="-".join(map(str, case)))
    for case in HALF_LIVES
]


@pytest.mark.parametrize(("delay", "kappa"), HALF_LIFE_CASES)
def test_a_half_life_is_had_and_not_beaten(delay: int, kappa: float) -> None:
    draws = torch.rand(300, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tolist()
    for method, expected in zip(HALF_LIFE_COLUMNS, HALF_LIVES[delay, kappa], strict=True):
        found = best_half_life(kappa, delay, method)
        assert found.half_life == pytest.approx(expected, rel=0.03), method
        assert slowest(kappa, delay, found.momentum, found.lr, method, 5000) == pytest.approx(found.half_life, rel=0.03)
        # The smallest and the largest curvature, by the updates themselves
        ends = [decay(delay, found.momentum, found.lr * curvature, method) for curvature in (1 / kappa, 1.0)]
        assert half_life(max(ends)) <= found.half_life * 1.03
        for first, second in draws:  # random (lr, momentum), most of them near what was found
            momentum = 1 - (1 - found.momentum) ** (0.5 + first)
            lr = found.lr * 4 ** (second - 0.5)
            assert slowest(kappa, delay, momentum, lr, method, 60) > found.half_life * 0.97


def test_late_gradients_make_momentum_useless_and_mitigations_useful_again() -> None:
    assert best_half_life(100, 4, "none").momentum == 0
    assert best_half_life(100, 4, "sc").momentum > 0.9
    without_delay = best_half_life(100, 0).half_life
    sqrt = math.sqrt(100)
    assert without_delay == pytest.approx(math.log(0.5) / math.log((sqrt - 1) / (sqrt + 1)), rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1, 0.9, "none"), "curvature=0.0 is not allowed; it must be a finite number, above 0"),
        ((math.nan, 1, 0.9, "none"), "curvature=nan"),
        ((1.0, -1, 0.9, "none"), "delay=-1"),
        ((1.0, 1, 1.0, "none"), "momentum=1.0 is not allowed; it must be a finite number, 0 or more, below 1"),
        ((1.0, 1, 0.9, "shift"), "mitigation='shift' is not allowed.*Did you mean 'shifted'"),
    ],
)
def test_what_is_not_allowed(arguments: tuple[float, int, float, MitigationName], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        max_stable_lr(*arguments[:3], mitigation=arguments[3])


def test_what_else_is_not_allowed() -> None:
    with pytest.raises(ConfigurationError, match="condition_number=0.5"):
        best_half_life(0.5, 1)
    for coefficients in ([1.0], [0.0, 1.0], [[1.0, 2.0]]):
        with pytest.raises(ConfigurationError, match="two coefficients or more"):
            largest_root(torch.tensor(coefficients))
