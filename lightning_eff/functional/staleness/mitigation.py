"""What makes good gradients that come D updates late: spike compensation, weight prediction, shrinking.

In pipelined backpropagation a stage updates its weights as soon as a gradient reaches it. That gradient is the one of D
updates ago (:func:`~lightning_eff.functional.staleness.schedule.stage_delay`):

    v_{t+1} = m v_t + g_t,     w_{t+1} = w_t - lr v_{t+1},     g_t the gradient at the weights of update t - D

Two corrections in the optimizer, alone or together:

    spike compensation SC_D     w_{t+1} = w_t - lr (a v_{t+1} + b g_t),   a = m^D,  b = (1 - m^D) / (1 - m)
    linear weight prediction    the forward pass uses  w_t - lr T v_t  (LWP^v)  or  w_t + T (w_t - w_{t-1})  (LWP^w)

SC_D pays at once what the gradient would have moved the weights by in the D updates it came late,
m + m^2 + .. + m^D of it, and from then on every gradient acts as if it had been on time. LWP looks T = D updates ahead
along the velocity. The combination that the paper recommends is LWP^v with T = D and SC_D.

Functions that end in ``_`` overwrite lists of tensors, all weights of a stage in one call; those without make new
tensors of one, with the same arithmetic.

Legend: S ``stages``, s ``stage`` (0 is the first), D ``delay`` in updates, m ``momentum``, w ``weight``, v ``velocity``
(heavy ball as in ``torch.optim.SGD``: no dampening, v_0 = 0), g ``grad``, T ``horizon`` in updates, k ``in_flight``.

References:
    Kosson, Chiley, Venigalla, Hestness, Köster, Pipelined Backpropagation at Scale: Training Large Models without
    Batches, MLSys 2021, arXiv:2003.11666. Only its abstract and introduction were at hand: the definitions of SC and
    LWP and which combination wins are from memory; that they agree with each other (momentum is as if undelayed, SC_1
    is Nesterov's momentum, SC is LWP in other coordinates) is tested.
    Chen, Yang, Cheng, SpecTrain, 2018, arXiv:1809.02839 (:func:`spectrain_horizons`; as read in public code).
    Zhuang, Wang, Liu, Lin, FDG, 2019 (:func:`shrink_factor`; from memory).
    Chiley et al., Online Normalization, NeurIPS 2019 (:func:`scale_hyperparameters`; from memory).
Differs: weights are predicted for Adam and its relatives, too (:mod:`lightning_eff.functional.staleness.directions`),
    which the paper does not treat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_eff.checks import Real, Whole, check
from lightning_eff.functional.staleness.schedule import FINE_GRAINED, stage_delay

MOMENTUM, FROM_0 = Real(0, 1), Real(0)


def _power_sum(momentum: float, delay: float) -> float:
    """1 + m + .. + m^(D - 1) = (1 - m^D) / (1 - m), for real D as well; no digits lost near m = 1."""
    momentum, delay = check("momentum", momentum, MOMENTUM), check("delay", delay, FROM_0)
    if momentum == 1:
        return float(delay)  # the limit, D
    if momentum == 0:
        return float(delay > 0)  # 0^0 = 1 alone
    return -math.expm1(delay * math.log(momentum)) / (1 - momentum)  # m^D - 1 = expm1(D ln m)


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
    b = _power_sum(momentum, delay)  # (1 - m^D) / (1 - m)
    return math.pow(float(momentum), float(delay)), b  # a = m^D


def geometric_horizon(momentum: float, delay: float) -> float:
    """Return m + m^2 + .. + m^D, the horizon at which LWP without SC equals SC_D.

    Then the weights it predicts are those of SC_D. It is how far momentum alone carries the weights in D updates
    without a gradient, in units of lr v: less than D.

    Raises:
        ConfigurationError: an argument is out of its range (:func:`spike_coefficients`).

    Example:
        >>> geometric_horizon(0.5, 2)
        0.75
    """
    total = _power_sum(momentum, delay)
    return float(momentum) * total  # m (1 + m + .. + m^(D - 1))


def spectrain_horizons(stage: int, stages: int, *, in_flight: int = FINE_GRAINED) -> tuple[int, int]:
    """Return SpecTrain's horizons (forward, backward): every stage predicts its weights at one and the same moment.

    That moment is the sample's backward on stage 0. Then stage s will be between 0 and k s updates beyond the sample's
    own, as the order of operations allows; the middle floor(k s / 2) is what the time steps give for k of 1 and 2. With
    slack (k > 2) it is a choice: the earliest times would give (k - 1) s.

    Raises:
        ConfigurationError: an argument is out of its range (:func:`stage_delay`).

    Example:
        >>> [spectrain_horizons(stage, 3) for stage in range(3)]
        [(4, 0), (3, 1), (2, 2)]
        >>> [spectrain_horizons(stage, 3, in_flight=1) for stage in range(3)]
        [(2, 0), (1, 0), (1, 1)]
    """
    late = stage_delay(stage, stages, in_flight=in_flight)
    backward = in_flight * stage // 2  # floor(k s / 2)
    return late + backward, backward  # a forward pass comes D_s updates before its backward


def predict_weight(weight: Tensor, velocity: Tensor, *, lr: float, horizon: float) -> Tensor:
    """Return the weight ``horizon`` updates ahead if the velocity stays, w - lr T v (LWP^v); a new tensor.

    Args:
        weight: w, any shape and floating dtype.
        velocity: v, the momentum buffer; or what else the optimizer subtracts per unit of lr.
        lr: of the updates to come.
        horizon: T, in updates; 0 gives w to the last bit.

    Example:
        >>> predict_weight(torch.tensor([1.0]), torch.tensor([0.5]), lr=0.5, horizon=2)
        tensor([0.5000])
    """
    weight = weight.clone()
    predict_weights_([weight], [velocity], lr=lr, horizon=horizon)
    return weight


def predict_weights_(weights: Sequence[Tensor], velocities: Sequence[Tensor], *, lr: float, horizon: float) -> None:
    """Overwrite every weight by what it will be ``horizon`` updates ahead, as :func:`predict_weight`.

    Example:
        >>> weight = torch.tensor([1.0])
        >>> predict_weights_([weight], [torch.tensor([0.5])], lr=0.5, horizon=2)
        >>> weight
        tensor([0.5000])
    """
    if horizon:
        torch._foreach_add_(list(weights), list(velocities), alpha=-lr * horizon)  # w - lr T v


def extrapolate_weight(weight: Tensor, previous: Tensor, *, horizon: float) -> Tensor:
    """Return the same from the last two weights, w_t + T (w_t - w_{t-1}) (LWP^w); a new tensor.

    It needs no learning rate and holds for every optimizer, but follows the whole last step: the spike of SC, weight
    decay, and after a drop of the learning rate too far.

    Example:
        >>> extrapolate_weight(torch.tensor([1.0]), torch.tensor([1.5]), horizon=2)
        tensor([0.])
    """
    weight = weight.clone()
    extrapolate_weights_([weight], [previous], horizon=horizon)
    return weight


def extrapolate_weights_(weights: Sequence[Tensor], previous: Sequence[Tensor], *, horizon: float) -> None:
    """Overwrite every weight by what it will be ``horizon`` updates ahead, as :func:`extrapolate_weight`.

    Example:
        >>> weight = torch.tensor([1.0])
        >>> extrapolate_weights_([weight], [torch.tensor([1.5])], horizon=2)
        >>> weight
        tensor([0.])
    """
    if horizon:
        steps = torch._foreach_sub(list(weights), list(previous))  # w_t - w_{t-1}
        torch._foreach_add_(list(weights), steps, alpha=horizon)  # w_t + T (w_t - w_{t-1})


def sgd_update(
    weight: Tensor, velocity: Tensor, grad: Tensor, *, lr: float, momentum: float, a: float = 1.0, b: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Do one update with (generalised) spike compensation: v' = m v + g, w' = w - lr (a v' + b g).

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
    velocity = (velocity * momentum).add_(grad)  # v' = m v + g
    weight = torch.add(weight, velocity, alpha=-lr * a)  # w - lr a v'
    add_spikes_([weight], [grad], lr=lr, b=b)  # - lr b g
    return weight, velocity


def add_spikes_(weights: Sequence[Tensor], grads: Sequence[Tensor], *, lr: float, b: float) -> None:
    """Subtract from every weight what a late gradient would have moved it by, w - lr b g: the spike of SC_D.

    The rest of the update, w - lr a v', is an optimizer's with the learning rate lr a.

    Args:
        weights: w, overwritten.
        grads: g, one for each weight.
        lr: learning rate.
        b: weight of the gradient (:func:`spike_coefficients`).

    Example:
        >>> weight = torch.tensor([1.0])
        >>> add_spikes_([weight], [torch.tensor([1.0])], lr=0.5, b=1.5)
        >>> weight
        tensor([0.2500])
    """
    if b:  # without a spike nothing is added: 0 times an infinite gradient would be NaN
        torch._foreach_add_(list(weights), list(grads), alpha=-lr * b)  # w - lr b g


def shrink_factor(delay: int, gamma: float) -> float:
    """Return gamma^D, the factor for a gradient that is D updates late: gradient shrinking (from memory, unverified).

    Raises:
        ConfigurationError: ``gamma`` is not from 0 to 1, or ``delay`` is negative.

    Example:
        >>> shrink_factor(2, 0.5)
        0.25
    """
    late, gamma = check("delay", delay, FROM_0), check("gamma", gamma, Real(0, 1))
    return math.pow(gamma, late)  # gamma^D


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
    batch_size = check("batch_size", batch_size, Whole(1))
    new_batch_size = check("new_batch_size", new_batch_size, Whole(1))
    lr = check("lr", lr, FROM_0)
    ratio = new_batch_size / batch_size  # N' / N
    # lr' = lr (1 - m') / (1 - m) N' / N, where _power_sum is (1 - m') / (1 - m), and checks m; m' = m^(N' / N)
    return lr * _power_sum(momentum, ratio) * ratio, math.pow(momentum, ratio)
