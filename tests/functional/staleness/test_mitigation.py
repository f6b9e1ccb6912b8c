"""The optimizer against torch's and against golden sequences, lists of tensors against one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.staleness.mitigation import (
    add_spikes_,
    extrapolate_weight,
    extrapolate_weights_,
    geometric_horizon,
    predict_weight,
    predict_weights_,
    scale_hyperparameters,
    sgd_update,
    shrink_factor,
    spectrain_horizons,
    spike_coefficients,
)
from tests.functional.staleness.losses import nonlinear

# w_1 .. w_8 of w_0 = 1, loss w^2 / 2, lr 0.1, m 0.9, D = 2: (spike, prediction) -> weights
GOLDEN = {
    ("none", "none"): [0.9, 0.71, 0.439, 0.1051, -0.26641, -0.644669, -0.9956121, -1.28481989],
    ("sc", "none"): [0.729, 0.3851, -0.02441, -0.419528, -0.7548373, -0.98414846, -1.081010526, -1.0353647651],
    ("none", "v"): [0.9, 0.71, 0.439, 0.1251, -0.19041, -0.464069, -0.6600921, -0.75436989],
    ("sc", "v"): [0.729, 0.3851, -0.02441, -0.365328, -0.5830773, -0.62468246, -0.499113726, -0.2470091451],
    ("sc", "w"): [0.729, 0.3851, -0.02441, -0.272646, -0.3820497, -0.3037052, -0.168990702, -0.0164345577],
}
Gradient = Callable[[Tensor], Tensor]


class Run:
    """Delayed training of one stage: gradients at the weights that the forward pass saw ``late`` updates ago."""

    def __init__(
        self, weight: Tensor, late: int, *, lr: float, momentum: float, a: float = 1.0, b: float = 0.0
    ) -> None:
        self.weight, self.previous, self.velocity = weight, weight, torch.zeros_like(weight)
        self.late, self.lr, self.settings = late, lr, {"lr": lr, "momentum": momentum, "a": a, "b": b}
        self.seen: list[Tensor] = []

    def look(self, prediction: str = "none", horizon: float = 0.0) -> Tensor:
        if prediction == "v":
            return predict_weight(self.weight, self.velocity, lr=self.lr, horizon=horizon)
        return extrapolate_weight(self.weight, self.previous, horizon=horizon if prediction == "w" else 0)

    def update(self, gradient: Gradient, prediction: str = "none", horizon: float = 0.0) -> Tensor:
        self.seen.append(self.look(prediction, horizon))
        grad = gradient(self.seen[max(0, len(self.seen) - 1 - self.late)])
        before = self.weight
        self.weight, self.velocity = sgd_update(self.weight, self.velocity, grad, **self.settings)
        self.previous = before
        return self.weight


@pytest.mark.parametrize(("spike", "prediction"), GOLDEN)
def test_golden_sequences(spike: str, prediction: str) -> None:
    a, b = spike_coefficients(0.9, 2 if spike == "sc" else 0)
    run = Run(torch.ones((), dtype=torch.float64), 2, lr=0.1, momentum=0.9, a=a, b=b)
    found = [float(run.update(lambda w: w, prediction, 2)) for _ in range(8)]
    assert found == pytest.approx(GOLDEN[spike, prediction], abs=1e-12, rel=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("prediction", ["v", "w"])
def test_without_delay_it_is_torch_sgd_bit_for_bit(prediction: str, momentum: float, dtype: torch.dtype) -> None:
    start = torch.randn(100, generator=torch.Generator().manual_seed(1)).to(dtype)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.03, momentum=momentum)
    a, b = spike_coefficients(momentum, 0)
    run = Run(start, 0, lr=0.03, momentum=momentum, a=a, b=b)
    for _ in range(50):
        parameter.grad = nonlinear(parameter.detach())
        optimizer.step()
        assert torch.equal(run.update(nonlinear, prediction, 0), parameter.detach())


def test_an_infinite_gradient_is_not_made_nan() -> None:
    weight, _ = sgd_update(torch.zeros(1), torch.zeros(1), torch.tensor([math.inf]), lr=0.1, momentum=0.9)
    assert float(weight) == -math.inf  # as torch.optim.SGD has it


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_one_update_late_spike_compensation_is_nesterov(momentum: float) -> None:
    """On gradients that are not delayed: then it is the same formula."""
    assert spike_coefficients(momentum, 1) == pytest.approx((momentum, 1.0), rel=1e-14)
    start = torch.randn(100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.03, momentum=momentum, nesterov=True)
    a, b = spike_coefficients(momentum, 1)
    run = Run(start, 0, lr=0.03, momentum=momentum, a=a, b=b)
    for _ in range(50):
        parameter.grad = nonlinear(parameter.detach())
        optimizer.step()
        torch.testing.assert_close(run.update(nonlinear), parameter.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("late", [1, 2, 5, 30])
def test_a_late_gradient_acts_as_if_it_had_been_on_time(late: int, momentum: float) -> None:
    def response(arrival: int, a: float, b: float) -> list[float]:
        weight = velocity = torch.zeros((), dtype=torch.float64)
        weights = []
        for t in range(100):
            grad = torch.tensor(float(t == arrival), dtype=torch.float64)
            weight, velocity = sgd_update(weight, velocity, grad, lr=0.1, momentum=momentum, a=a, b=b)
            weights.append(float(weight))
        return weights

    on_time, compensated = response(0, 1.0, 0.0), response(late, *spike_coefficients(momentum, late))
    assert compensated[late:] == pytest.approx(on_time[late:], abs=1e-14, rel=1e-14)
    assert compensated[:late] == [0.0] * late


def test_spike_coefficients_at_the_edges() -> None:
    assert spike_coefficients(0.0, 0) == (1.0, 0.0)
    assert spike_coefficients(0.0, 3) == (0.0, 1.0)
    assert spike_coefficients(1.0, 7) == (1.0, 7.0)
    assert spike_coefficients(1.0, 0) == (1.0, 0.0)
    assert spike_coefficients(0.9, 0) == (1.0, 0.0)
    assert geometric_horizon(0.0, 5) == 0.0
    assert geometric_horizon(1.0, 5) == 5.0


@given(st.floats(0.0, 1.0), st.integers(0, 300))
def test_spike_coefficients_are_sums_of_powers(momentum: float, late: int) -> None:
    a, b = spike_coefficients(momentum, late)
    powers = [momentum**k for k in range(late + 1)]
    assert a == pytest.approx(powers[-1], rel=1e-12)
    assert b == pytest.approx(math.fsum(powers[:-1]), rel=1e-12)
    assert geometric_horizon(momentum, late) == pytest.approx(math.fsum(powers[1:]), rel=1e-12)
    assert a == pytest.approx(1 - (1 - momentum) * b, abs=1e-12)  # the final effect of a gradient is what it was


@pytest.mark.parametrize("late", [0, 1, 4])
@pytest.mark.parametrize("horizon", [0.5, 2.0, 4.0])
def test_weight_prediction_is_spike_compensation_in_other_coordinates(horizon: float, late: int) -> None:
    """LWP_T predicts the weights of (a, b) = (1 + T - T / m, T / m), on noisy nonlinear gradients."""
    m, start = 0.9, torch.randn(20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    noise = torch.randn(60, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    plain = Run(start, late, lr=0.01, momentum=m)
    spiked = Run(start, late, lr=0.01, momentum=m, a=1 + horizon - horizon / m, b=horizon / m)
    by_weights = Run(start, late, lr=0.01, momentum=m)
    for k in range(60):
        plain.update(lambda w, k=k: nonlinear(w) + noise[k], "v", horizon)
        spiked.update(lambda w, k=k: nonlinear(w) + noise[k])
        by_weights.update(lambda w, k=k: nonlinear(w) + noise[k], "w", horizon)
        torch.testing.assert_close(plain.look("v", horizon), spiked.weight, rtol=0, atol=1e-13)
        torch.testing.assert_close(plain.weight, by_weights.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("late", [1, 2, 7])
def test_spike_compensation_is_prediction_over_the_geometric_horizon(late: int) -> None:
    m, horizon = 0.9, geometric_horizon(0.9, late)
    a, b = spike_coefficients(m, late)
    assert (horizon / m, 1 + horizon - horizon / m) == pytest.approx((b, a), rel=1e-13)
    assert horizon < late


def test_predictions_are_new_tensors_and_exact_without_a_horizon() -> None:
    weight, velocity = torch.randn(5), torch.full((5,), math.inf)
    for found in (predict_weight(weight, velocity, lr=0.1, horizon=0), extrapolate_weight(weight, velocity, horizon=0)):
        assert torch.equal(found, weight)
        assert found is not weight
    before = [weight.clone(), weight.clone()]
    sgd_update(before[0], before[1], torch.ones(5), lr=0.1, momentum=0.9)
    assert all(torch.equal(tensor, weight) for tensor in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("horizon", [0.0, 0.75, 6.0])
def test_lists_are_overwritten_with_the_bits_of_torchs_own_arithmetic(horizon: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    weights, others = ([torch.randn(n, 3, generator=generator).to(dtype) for n in (5, 1, 40)] for _ in range(2))
    lr, b = 0.03, 1.7 * horizon
    expected: dict[str, list[Tensor]] = {
        "predict": [torch.add(w, v, alpha=-lr * horizon) for w, v in zip(weights, others, strict=True)],
        "extrapolate": [torch.add(w, w - p, alpha=horizon) for w, p in zip(weights, others, strict=True)],
        "spike": [torch.add(w, g, alpha=-lr * b) for w, g in zip(weights, others, strict=True)],
    }
    calls: dict[str, Callable[[list[Tensor]], None]] = {
        "predict": lambda own: predict_weights_(own, others, lr=lr, horizon=horizon),
        "extrapolate": lambda own: extrapolate_weights_(own, others, horizon=horizon),
        "spike": lambda own: add_spikes_(own, others, lr=lr, b=b),
    }
    for name, call in calls.items():
        own = [w.clone() for w in weights]
        call(own)
        assert all(torch.equal(w, e) for w, e in zip(own, expected[name], strict=True)), name
    for w, v, e in zip(weights, others, expected["predict"], strict=True):
        assert torch.equal(predict_weight(w, v, lr=lr, horizon=horizon), e)
    for w, p, e in zip(weights, others, expected["extrapolate"], strict=True):
        assert torch.equal(extrapolate_weight(w, p, horizon=horizon), e)


def test_lists_without_a_horizon_or_a_spike_keep_their_bits() -> None:
    """Even beside an infinite velocity, 0 times which would be NaN."""
    weight, infinite = torch.randn(5), [torch.full((5,), math.inf)]
    own = [weight.clone()]
    predict_weights_(own, infinite, lr=0.1, horizon=0)
    extrapolate_weights_(own, infinite, horizon=0)
    add_spikes_(own, infinite, lr=0.1, b=0)
    assert torch.equal(own[0], weight)


def test_extrapolation_follows_the_spike_and_prediction_does_not() -> None:
    a, b = spike_coefficients(0.9, 4)
    weight, velocity, grad = torch.ones(1), torch.zeros(1), torch.ones(1)
    new, velocity = sgd_update(weight, velocity, grad, lr=0.01, momentum=0.9, a=a, b=b)
    steps = [
        float(new - predict_weight(new, velocity, lr=0.01, horizon=4)),
        float(new - extrapolate_weight(new, weight, horizon=4)),
    ]
    assert steps == pytest.approx([0.04, 0.04 * (a + b)], rel=1e-4)


@pytest.mark.parametrize(("reference", "lr", "momentum"), [(128, 6.428e-6, 0.99917721), (256, 1.6073e-6, 0.99958852)])
def test_scaled_hyperparameters(reference: int, lr: float, momentum: float) -> None:
    found = scale_hyperparameters(0.1, 0.9, reference, 1)
    assert found == (pytest.approx(lr, rel=1e-4), pytest.approx(momentum, abs=5e-9))
    assert scale_hyperparameters(*found, 1, reference) == pytest.approx((0.1, 0.9), rel=1e-9)
    assert found[0] / (1 - found[1]) == pytest.approx(0.1 / (1 - 0.9) / reference, rel=1e-9)  # per sample
    assert scale_hyperparameters(0.1, 0.0, 128, 1) == (0.1 / 128, 0.0)


def test_shrinking() -> None:
    assert [shrink_factor(d, 0.5) for d in range(3)] == [1.0, 0.5, 0.25]
    assert shrink_factor(100, 1.0) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectrain_horizons(3, 3), "stage=3"),
        (
            lambda: spike_coefficients(1.1, 2),
            "momentum=1.1 is not allowed; it must be a .* 1 at most",
        ),
        (lambda: spike_coefficients(math.nan, 2), "momentum=nan"),
        (lambda: spike_coefficients(0.9, -1), "delay=-1 is not allowed; it must be a finite number, 0 or more"),
        (lambda: spike_coefficients(0.9, math.inf), "delay=inf"),
        (lambda: geometric_horizon(-0.1, 2), "momentum=-0.1"),
        (lambda: shrink_factor(2, 1.5), "gamma=1.5"),
        (lambda: shrink_factor(-2, 0.5), "delay=-2"),
        (lambda: scale_hyperparameters(0.1, 0.9, 0, 1), "batch_size=0"),
        (lambda: scale_hyperparameters(0.1, 1.9, 1, 1), "momentum=1.9"),
        (lambda: scale_hyperparameters(-0.1, 0.9, 1, 1), "lr=-0.1"),
    ],
)
def test_what_is_not_allowed(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()
