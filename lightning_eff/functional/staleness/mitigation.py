"""Pipelined backpropagation: never drain the pipeline, update every stage at once, make good what comes late.

The layers lie on S stages. A stage updates its weights as soon as a gradient reaches it, so it is never idle; but the
gradient of a sample comes D_s updates after its forward pass (:func:`delay`):

    v_{t+1} = m v_t + g_t,     w_{t+1} = w_t - lr v_{t+1},     g_t the gradient at the weights of update t - D_s

Two corrections in the optimizer, alone or together:

    spike compensation SC_D     w_{t+1} = w_t - lr (a v_{t+1} + b g_t),   a = m^D,  b = (1 - m^D) / (1 - m)
    linear weight prediction    the forward pass uses  w_t - lr T v_t  (LWP^v)  or  w_t + T (w_t - w_{t-1})  (LWP^w)

SC_D pays at once what the gradient would have moved the weights by in the D updates it came late,
m + m^2 + .. + m^D of it, and from then on every gradient acts as if it had been on time. LWP looks T = D updates ahead
along the velocity. The combination that the paper recommends is LWP^v with T = D and SC_D.

Legend: S ``stages``, s ``stage`` (0 is the first), D ``delay`` in updates, m ``momentum``, w ``weight``, v ``velocity``
(heavy ball as in ``torch.optim.SGD``: no dampening, v_0 = 0), g ``grad``, T ``horizon`` in updates, N ``samples`` (what
is one forward and one backward pass: a sample in the paper, a micro-batch here), k ``in_flight``.

References:
    Kosson, Chiley, Venigalla, Hestness, Köster, Pipelined Backpropagation at Scale: Training Large Models without
    Batches, MLSys 2021, arXiv:2003.11666. Only its abstract and introduction were at hand: the definitions of SC and
    LWP and which combination wins are from memory; that they agree with each other (momentum is as if undelayed, SC_1
    is Nesterov's momentum, SC is LWP in other coordinates, delays of the schedule) is tested.
    Chen, Yang, Cheng, SpecTrain, 2018, arXiv:1809.02839 (:func:`spectrain_horizons`; as read in public code).
    Zhuang, Wang, Liu, Lin, FDG, 2019 (:func:`shrink_factor`; from memory).
    Chiley et al., Online Normalization, NeurIPS 2019 (:func:`scale_hyperparameters`; from memory).
Differs: a stage without a gradient yet does not step at all, so nothing advances while the pipeline fills. Schedules
    with other delays than the paper's (1F1B, or slack for jitter) are had by ``in_flight``. Weights are predicted for
    Adam and its relatives, too (:mod:`lightning_eff.functional.staleness.directions`), which the paper does not treat.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_eff.checks import Real, Whole, check

Kind = Literal["forward", "backward"]
FINE_GRAINED = 2
"""``in_flight`` of the paper's schedule: every stage does one forward and one backward per time step."""


class Operation(NamedTuple):
    """One pass of one sample through one stage.

    Attributes:
        kind: ``"forward"`` or ``"backward"``; a backward ends with the stage's update.
        sample: its number, from 0.
        version: updates of this stage before it.
        step: the time step it runs in.
    """

    kind: Kind
    sample: int
    version: int
    step: int


def delay(stage: int, stages: int, *, in_flight: int = FINE_GRAINED) -> int:
    """D_s, the updates of a stage between the forward and the backward pass of one sample: k (S - 1 - s).

    The stage keeps the activations of D_s + 1 samples. Sample i sees min(i, D_s): the pipeline is filling.

    Args:
        stage: s, 0 .. S - 1.
        stages: S, at least 1.
        in_flight: k, by how many samples a stage runs ahead of the next. 2 is the paper's fine-grained schedule, 1 is
            1F1B without flush (a stage does forwards and backwards in turn), more leaves slack for jitter (ours).

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> [delay(stage, 4) for stage in range(4)]
        [6, 4, 2, 0]
        >>> [delay(stage, 4, in_flight=1) for stage in range(4)]
        [3, 2, 1, 0]
    """
    stages, in_flight = _at_least_one(stages=stages, in_flight=in_flight)
    stage = check("stage", stage, Whole(0, stages - 1, f"there are {stages}"))
    return in_flight * (stages - 1 - stage)


def _at_least_one(**counts: int) -> list[int]:
    return [check(name, count, Whole(1)) for name, count in counts.items()]


def _from_0(high: float | None = None, **values: float) -> list[float]:
    """The values, finite and from 0 to ``high``."""
    return [check(name, value, Real(0, high)) for name, value in values.items()]


def _power_sum(momentum: float, delay: float) -> float:
    """1 + m + .. + m^(D - 1) = (1 - m^D) / (1 - m), for real D as well; no digits lost near m = 1."""
    (momentum,), (delay,) = _from_0(1, momentum=momentum), _from_0(delay=delay)
    if momentum == 1:
        return float(delay)
    if momentum == 0:
        return float(delay > 0)
    return -math.expm1(delay * math.log(momentum)) / (1 - momentum)


def spike_coefficients(momentum: float, delay: float) -> tuple[float, float]:
    """Return (a, b) of SC_D for :func:`sgd_update`: a = m^D, b = (1 - m^D) / (1 - m).

    D = 0 is plain momentum (1, 0), D = 1 Nesterov's (m, 1), m = 0 plain delayed SGD (0, 1), m = 1 the limit (1, D).
    b grows to 1 / (1 - m): it is lr b that has to be small.

    Args:
        momentum: m, 0 .. 1.
        delay: D, not negative; 2 D over-compensates (SC_2D), and it need not be whole.

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> spike_coefficients(0.5, 2)
        (0.25, 1.5)
        >>> spike_coefficients(0.5, 0)
        (1.0, 0.0)
    """
    b = _power_sum(momentum, delay)
    return math.pow(float(momentum), float(delay)), b


def geometric_horizon(momentum: float, delay: float) -> float:
    """The sum m + m^2 + .. + m^D: the horizon at which LWP without SC equals SC_D.

    Then the weights it predicts are those of SC_D. It is how far momentum alone carries the weights in D updates
    without a gradient, in units of lr v: less than D.

    Raises:
        ConfigurationError: an argument is out of its range (:func:`spike_coefficients`).

    Example:
        >>> geometric_horizon(0.5, 2)
        0.75
    """
    total = _power_sum(momentum, delay)
    return float(momentum) * total


def spectrain_horizons(stage: int, stages: int, *, in_flight: int = FINE_GRAINED) -> tuple[int, int]:
    """Return SpecTrain's horizons (forward, backward): every stage predicts its weights at one and the same moment.

    That moment is the sample's backward on stage 0. Then stage s will be between 0 and k s updates beyond the sample's
    own, as the order of operations allows; the middle floor(k s / 2) is what the time steps give for k of 1 and 2. With
    slack (k > 2) it is a choice: the earliest times would give (k - 1) s.

    Raises:
        ConfigurationError: an argument is out of its range (:func:`delay`).

    Example:
        >>> [spectrain_horizons(stage, 3) for stage in range(3)]
        [(4, 0), (3, 1), (2, 2)]
        >>> [spectrain_horizons(stage, 3, in_flight=1) for stage in range(3)]
        [(2, 0), (1, 0), (1, 1)]
    """
    late = delay(stage, stages, in_flight=in_flight)
    backward = in_flight * stage // 2
    return late + backward, backward


def predict(weight: Tensor, velocity: Tensor, *, lr: float, horizon: float) -> Tensor:
    """LWP^v: the weights ``horizon`` updates ahead if the velocity stays, w - lr T v; a new tensor.

    Args:
        weight: w, any shape and floating dtype.
        velocity: v, the momentum buffer; or what else the optimizer subtracts per unit of lr.
        lr: of the updates to come.
        horizon: T, in updates; 0 gives w to the last bit.

    Example:
        >>> predict(torch.tensor([1.0]), torch.tensor([0.5]), lr=0.5, horizon=2)
        tensor([0.5000])
    """
    return torch.add(weight, velocity, alpha=-lr * horizon) if horizon else weight.clone()


def extrapolate(weight: Tensor, previous: Tensor, *, horizon: float) -> Tensor:
    """LWP^w: the same from the last two weights, w_t + T (w_t - w_{t-1}); a new tensor.

    It needs no learning rate and holds for every optimizer, but follows the whole last step: the spike of SC, weight
    decay, and after a drop of the learning rate too far.

    Example:
        >>> extrapolate(torch.tensor([1.0]), torch.tensor([1.5]), horizon=2)
        tensor([0.])
    """
    return torch.add(weight, weight - previous, alpha=horizon) if horizon else weight.clone()


def sgd_update(
    weight: Tensor, velocity: Tensor, grad: Tensor, *, lr: float, momentum: float, a: float = 1.0, b: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One update with (generalised) spike compensation: v' = m v + g, w' = w - lr (a v' + b g).

    With (a, b) = (1, 0) it is ``torch.optim.SGD(momentum=m)`` to the last bit.

    Args:
        weight: w; any shape, floating dtype.
        velocity: v, zeros before the first update.
        grad: g.
        lr: learning rate.
        momentum: m.
        a: weight of the new velocity (:func:`spike_coefficients`).
        b: weight of the new gradient.

    Returns:
        New tensors (w', v'); the arguments stay as they are.

    Example:
        >>> one = torch.ones(1)
        >>> a, b = spike_coefficients(0.5, 2)
        >>> sgd_update(one, 0 * one, one, lr=0.5, momentum=0.5, a=a, b=b)  # spike 1 + m + m^2
        (tensor([0.1250]), tensor([1.]))
    """
    velocity = (velocity * momentum).add_(grad)
    weight = torch.add(weight, velocity, alpha=-lr * a)
    # Without a spike nothing is added: 0 times an infinite gradient would be NaN.
    return (weight.add_(grad, alpha=-lr * b) if b else weight), velocity


def shrink_factor(delay: int, gamma: float) -> float:
    """Gradient shrinking: gamma^D, the factor for a gradient that is D updates late (from memory, unverified).

    Raises:
        ConfigurationError: ``gamma`` is not from 0 to 1, or ``delay`` is negative.

    Example:
        >>> shrink_factor(2, 0.5)
        0.25
    """
    (late,), (gamma,) = _from_0(delay=delay), _from_0(1, gamma=gamma)
    return math.pow(gamma, late)


def utilisation(samples: int, stages: int, *, fine_grained: bool = True) -> float:
    """Share of the time the stages work when the pipeline is filled and drained once for N samples.

        fine-grained: N / (N + 2 S - 2)        one after the other: N / (N + S - 1)

    Pipelined backpropagation drains once in a run (N is all its samples), a synchronous pipeline for every update.

    Args:
        samples: N.
        stages: S.
        fine_grained: a stage does one forward and one backward at the same time; else one of them (GPipe, 1F1B).

    Raises:
        ConfigurationError: an argument is below 1.

    Example:
        >>> round(utilisation(128, 34), 3)
        0.66
    """
    samples, stages = _at_least_one(samples=samples, stages=stages)
    return samples / (samples + (2 if fine_grained else 1) * (stages - 1))


def flush_bubble(stages: int, micro_batches: int) -> float:
    """Bubble fraction of GPipe and 1F1B with flush, (S - 1) / (M + S - 1): what pipelined backpropagation saves.

    Raises:
        ConfigurationError: an argument is below 1.

    Example:
        >>> flush_bubble(4, 9)
        0.25
    """
    stages, micro_batches = _at_least_one(stages=stages, micro_batches=micro_batches)
    return (stages - 1) / (micro_batches + stages - 1)


def schedule(samples: int, stages: int, *, in_flight: int = FINE_GRAINED) -> list[list[Operation]]:
    """For every stage its operations in order, with weight version and time step.

    The order follows from the delay alone: sample i goes forward when the stage has done max(0, i - D_s) updates, and
    backward when it has done i. An operation runs at the earliest step that its stage and its neighbour allow; what a
    step sends arrives in the next. With ``in_flight`` of 2 or more a stage does a forward and then a backward in one
    step, as in the paper; with 1 it does one of them.

    Args:
        samples: N, at least 1.
        stages: S, at least 1.
        in_flight: as in :func:`delay`.

    Raises:
        ConfigurationError: an argument is below 1.

    Example:
        >>> first, last = schedule(2, 2)
        >>> [(operation.kind, operation.sample, operation.step) for operation in first]
        [('forward', 0, 0), ('forward', 1, 1), ('backward', 0, 2), ('backward', 1, 3)]
        >>> [operation.version for operation in last]
        [0, 0, 1, 1]
    """
    samples = check("samples", samples, Whole(1, 2**20, "every operation is listed"))
    stages, in_flight = _at_least_one(stages=stages, in_flight=in_flight)
    waiting = [_order(samples, delay(stage, stages, in_flight=in_flight))[::-1] for stage in range(stages)]
    done: list[list[Operation]] = [[] for _ in range(stages)]
    steps: dict[tuple[int, Kind, int], int] = {}
    while any(waiting):
        for stage in (*range(stages), *reversed(range(stages))):
            while waiting[stage]:
                kind, sample, version = waiting[stage][-1]
                neighbour = stage - 1 if kind == "forward" else stage + 1
                sent = steps.get((neighbour, kind, sample)) if 0 <= neighbour < stages else -1
                if sent is None:
                    break
                free = _free_step(done[stage], kind, pairs=in_flight >= FINE_GRAINED)
                steps[stage, kind, sample] = step = max(sent + 1, free)
                done[stage].append(Operation(kind, sample, version, step))
                waiting[stage].pop()
    return done


def _order(samples: int, delay: int) -> list[tuple[Kind, int, int]]:
    """(kind, sample, version) of a stage's operations in order."""
    order: list[tuple[Kind, int, int]] = []
    for turn in range(samples + delay):
        if turn < samples:
            order.append(("forward", turn, max(0, turn - delay)))
        if turn >= delay:
            order.append(("backward", turn - delay, turn - delay))
    return order


def _free_step(done: list[Operation], kind: Kind, *, pairs: bool) -> int:
    """The first step a stage can do its next operation in: a backward shares the step of the forward before it."""
    if not done:
        return 0
    shares = pairs and done[-1].kind == "forward" and kind == "backward"
    return done[-1].step + (not shares)


def scale_hyperparameters(lr: float, momentum: float, batch_size: int, new_batch_size: int) -> tuple[float, float]:
    """Return (lr, momentum) for another batch size, so that a sample's gradient acts as long and as much as before.

        m' = m^(N' / N),     lr' = lr (1 - m') / (1 - m) N' / N

    Weight decay, epochs and the schedule (counted in samples) stay. The formula is from memory (Chiley et al. 2019).

    Args:
        lr: for ``batch_size``.
        momentum: m for ``batch_size``, 0 .. 1.
        batch_size: N, the reference.
        new_batch_size: N'; 1 in the paper.

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> lr, momentum = scale_hyperparameters(0.1, 0.9, batch_size=128, new_batch_size=1)
        >>> f"{lr:.4g} {momentum:.8f}"
        '6.428e-06 0.99917721'
    """
    batch_size, new_batch_size = _at_least_one(batch_size=batch_size, new_batch_size=new_batch_size)
    (lr,) = _from_0(lr=lr)
    ratio = new_batch_size / batch_size
    # _power_sum is (1 - m') / (1 - m), and checks m.
    return lr * _power_sum(momentum, ratio) * ratio, math.pow(momentum, ratio)
