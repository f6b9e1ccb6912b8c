"""What DropCompute gains: predicted from a recorded run, and in closed form for normal micro-batch times.

From a table of recorded times (letters as in :mod:`lightning_eff.functional.stragglers.threshold`), everything follows:

    k_in(tau)  = micro-batches that worker n of step i computes, the begun one finished
    T_i(tau)   = max_n (time at the end of its k_in-th micro-batch)
    speed-up   = [sum_in k_in / (I N M)] * [sum_i (T_i(inf) + T^c_i)] / [sum_i (T_i(tau) + T^c_i)]

in samples per second, relative to no dropping. As a function of tau that is a staircase with a step wherever some
worker is about to start a micro-batch: sorting these moments gives its value for *every* tau, and the best tau exactly.

The paper's objective (algorithm 2) supposes that a worker stops at tau to the moment:

    S_i(tau)   = (T_i + T^c_i) / (min(tau, T_i) + T^c_i),     Mtilde_i(tau) = (1/N) sum_n #{m : cumsum_m t_in < tau}
    S_eff(tau) = (1/I) sum_i S_i(tau) Mtilde_i(tau) / M

It is reported beside ours and never steers: with heavy tails the tau it picks gives much less than it promises.

References:
    Giladi et al., DropCompute, NeurIPS 2023, arXiv:2306.10598: section 4 (closed forms), algorithm 2 (threshold).
    Bailey, Borwein, Calkin, Girgensohn, Luke, Moll, Integrals, an introduction to experimental mathematics (expected
    maximum of N normal numbers).
Differs: the begun micro-batch is finished, and counts; the speed-up is samples of the window over seconds of the window
    instead of a mean over steps of ratios; every tau is a candidate instead of 200 of them.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_eff.checks import SHARE, Real, Whole, check
from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.stragglers.threshold import (
    Timings,
    check_min_micro_batches,
    check_timings,
    completed,
    step_times,
)

_NORMAL = NormalDist()
_EULER_GAMMA = 0.5772156649015329
MIN_GAIN = 0.02
"""Less is not worth the samples, and about what a window of 44 steps flatters its own best threshold by."""
_TIE = 1e-9
"""Relative difference below which two speed-ups are one: their sums round differently."""


class Prediction(NamedTuple):
    """What one threshold does.

    Attributes:
        step_s: mean seconds per step.
        drop_rate: share of the micro-batches that is not computed, 0..1.
        speedup: computed samples per second, relative to no dropping.
        ideal_speedup: the same by the paper's formula, which stops a worker at tau to the moment.
    """

    step_s: float
    drop_rate: float
    speedup: float
    ideal_speedup: float


def _total(values: Tensor) -> Tensor:
    """Sum of a vector, from left to right: the same to the last bit on every CPU, hence on every rank."""
    return values.cumsum(0)[-1]


def predicted(table: Tensor, other: Tensor | float, tau: float, min_micro_batches: int = 1) -> Prediction:
    """Predict a run with threshold ``tau`` from the timing table of a run without.

    Args:
        table: seconds, (I, N, M).
        other: seconds outside the loop, (I,) or a number.
        tau: compute threshold, seconds, not NaN.
        min_micro_batches: computed however late a worker is.

    Raises:
        ConfigurationError: the table, ``tau`` or ``min_micro_batches`` is not allowed.

    Example:
        >>> stalled = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0]]])  # worker 1 is slow
        >>> predicted(stalled, 1.0, tau=3.5)  # it computes 2 of 4 micro-batches: 6 of 8 in 6 + 1 of 12 + 1 seconds
        Prediction(step_s=7.0, drop_rate=0.25, speedup=1.392..., ideal_speedup=1.444...)
    """
    timings = check_timings(table, other)
    tau = _seconds(tau)
    min_micro_batches = check_min_micro_batches(min_micro_batches, timings.table.shape[-1])
    counts = completed(timings.table, tau, min_micro_batches)
    plain_s = float(_total(step_times(timings, torch.full_like(counts, timings.table.shape[-1]))))
    seconds = float(_total(step_times(timings, counts)))
    kept = int(counts.sum()) / timings.table.numel()
    # Without a first micro-batch and without other time a step takes no time and computes nothing.
    speedup = kept * plain_s / seconds if seconds else 0.0
    return Prediction(seconds / len(counts), 1 - kept, speedup, ideal_speedup(*timings, tau))


def ideal_speedup(table: Tensor, other: Tensor | float, tau: float) -> float:
    """Return S_eff(tau) of algorithm 2: what a worker would gain that could stop at tau to the moment.

    Example:
        >>> ideal_speedup(torch.ones(5, 3, 4), 1.0, tau=math.inf)
        1.0
    """
    tau = _seconds(tau)
    return float(
        _ideal_speedups(check_timings(table, other), torch.tensor([tau], dtype=torch.float64, device="cpu"))[0]
    )


def ideal_threshold(table: Tensor, other: Tensor | float, *, candidates: int = 200) -> float:
    """Return the tau that algorithm 2 picks: the largest :func:`ideal_speedup` on a grid, inf if none is above 1.

    The grid of the published code: equally spaced from the first moment at which some worker has done half of its
    micro-batches (the published code: 6 of 12) to the end of the slowest worker-step.
    """
    timings = check_timings(table, other)
    candidates = check("candidates", candidates, Whole(1, 2**20, "each is tried on every step"))
    ends = timings.table.cumsum(-1)
    half = (ends.shape[-1] + 1) // 2
    taus = torch.linspace(
        float(ends[..., half - 1].min()), float(ends.max()), candidates, dtype=torch.float64, device="cpu"
    )
    return _largest(taus, _ideal_speedups(timings, taus), 1.0)


def _ideal_speedups(timings: Timings, taus: Tensor) -> Tensor:
    """S_eff of every tau; (C,) -> (C,)."""
    ends = timings.table.cumsum(-1)
    slowest = ends[..., -1].amax(-1, keepdim=True)
    within = torch.searchsorted(ends.flatten(1).sort(dim=1).values, taus.expand(len(ends), -1).contiguous())
    kept = within.double() / ends[0].numel()
    other = timings.other[:, None]
    stopped = torch.minimum(taus.clamp(min=0.0), slowest) + other
    # tau = 0 without other time: a step of no seconds in which nothing is done.
    ratios = torch.where(stopped > 0, kept * (slowest + other) / stopped, 0.0)
    return ratios.mean(0)


class _Staircase(NamedTuple):
    """A whole run as a function of tau: entry c holds for tau_c <= tau < tau_(c+1)."""

    taus: Tensor
    """Distinct moments from 0 on, ascending, (C,)."""
    counts: Tensor
    """Computed micro-batches of the run, int64 (C,)."""
    seconds: Tensor
    """Seconds of the run, (C,)."""


def _staircase(timings: Timings, min_micro_batches: int) -> _Staircase:
    ends = torch.nn.functional.pad(timings.table.cumsum(-1), (1, 0))  # end of 0, 1, .. M micro-batches
    first = ends[..., min_micro_batches]
    moments, order = ends[..., min_micro_batches:-1].flatten(1).sort(dim=1, stable=True)
    begun = ends[..., min_micro_batches + 1 :].flatten(1).gather(1, order)  # when what starts at each moment ends
    slowest = torch.cat([first.amax(1, keepdim=True), begun], dim=1).cummax(1).values
    merged, order = moments.flatten().sort(stable=True)
    longer = slowest.diff(dim=1).flatten()[order]
    start = (slowest[:, 0] + timings.other).cumsum(0)[-1:]
    taus = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), merged])
    seconds = torch.cat([start, longer]).cumsum(0)
    last_of_its_moment = torch.cat([taus[1:] > taus[:-1], torch.ones(1, dtype=torch.bool, device="cpu")])
    counts = torch.arange(len(taus), dtype=torch.int64, device="cpu") + first.numel() * min_micro_batches
    return _Staircase(taus[last_of_its_moment], counts[last_of_its_moment], seconds[last_of_its_moment])


def best_threshold(
    table: Tensor,
    other: Tensor | float = 0.0,
    *,
    min_micro_batches: int = 1,
    max_drop_rate: float = 1.0,
    min_gain: float = MIN_GAIN,
    candidates: Tensor | None = None,
) -> float:
    """Return the threshold with the most computed samples per second, where a begun micro-batch is finished.

    Exact: every tau is considered. The answer is the middle of the interval of equally good thresholds, so that the
    jitter of the next steps does not push a worker over its edge. It is a function of the table alone, to the last bit:
    ranks that hold the same table need not talk. A short window flatters its own optimum: judge it on other steps.

    Args:
        table: seconds of a run without dropping, (I, N, M); 44 x 1,024 x 12 takes about 0.2 s.
        other: seconds outside the loop, (I,) or a number.
        min_micro_batches: computed however late a worker is, 0 .. M.
        max_drop_rate: highest share of micro-batches that may be dropped over the table, 0..1; the paper saw no loss of
            accuracy up to about 0.1.
        min_gain: least speed-up - 1 for which anything is dropped, 0 or more.
        candidates: only these thresholds, seconds, (C,); default every one.

    Returns:
        Seconds; inf if dropping does not gain ``min_gain``. Of equally good thresholds the largest.

    Raises:
        ConfigurationError: an argument is not allowed.

    Example:
        >>> stalled = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0]]])
        >>> best_threshold(stalled, 1.0)  # 2 <= tau < 3: they do 3 and 1 of 4, both in 3 seconds
        2.5
        >>> best_threshold(stalled, 1.0, max_drop_rate=0.25)  # 3 <= tau < 6: they do 4 and 2, in 6 seconds
        4.5
        >>> best_threshold(torch.ones(5, 3, 4), 1.0)
        inf
    """
    timings = check_timings(table, other)
    min_micro_batches = check_min_micro_batches(min_micro_batches, timings.table.shape[-1])
    max_drop_rate = check("max_drop_rate", max_drop_rate, SHARE)
    min_gain = check("min_gain", min_gain, Real(0, math.inf))
    stairs = _staircase(timings, min_micro_batches)
    speeds = stairs.counts.double() / stairs.seconds
    worth = float(speeds[-1]) * (1 + min_gain)
    speeds = torch.where(stairs.counts >= (1 - max_drop_rate) * timings.table.numel() * (1 - _TIE), speeds, -1.0)
    if candidates is None:
        return _largest(_middles(stairs.taus), speeds, worth)
    taus = _check_candidates(candidates)
    return _largest(taus, speeds[torch.searchsorted(stairs.taus, taus, right=True) - 1], worth)


def _middles(taus: Tensor) -> Tensor:
    """The middle of every interval [tau_c, tau_(c+1)); inf for the last."""
    middle = taus[:-1] + taus.diff() / 2
    middle = torch.where(middle < taus[1:], middle, taus[:-1])  # neighbouring floats have nothing between them
    return torch.cat([middle, torch.full((1,), math.inf, dtype=torch.float64, device="cpu")])


def _largest(taus: Tensor, speeds: Tensor, worth: float) -> float:
    """The largest of the ascending ``taus`` with the best of ``speeds``; inf unless it is above ``worth``."""
    best = float(speeds.max())
    if not best > worth * (1 + _TIE):
        return math.inf
    return float(taus[(speeds >= best * (1 - _TIE)).nonzero()[-1, 0]])


def _check_candidates(candidates: Tensor) -> Tensor:
    taus = candidates.detach().to("cpu", torch.float64)
    if taus.dim() != 1 or taus.numel() == 0 or not bool((taus >= 0).all()):
        raise ConfigurationError("candidates is a vector of one or more thresholds in seconds, 0 or more each.")
    return taus.sort().values


def _seconds(tau: float) -> float:
    return float(check("tau", tau, Real(high=math.inf)))


def expected_slowest(workers: int, micro_batches: int, mean_s: float, std_s: float) -> float:
    """Return the expected compute time of the slowest worker, seconds: grows like sqrt(log N).

        E[T] ~ M mu + sqrt(M) sigma [(1 - gamma) Phi^-1(1 - 1/N) + gamma Phi^-1(1 - 1/(e N))]

    gamma is the Euler-Mascheroni constant; the N worker-steps are independent and normal. Within 2.5 % of the exact
    excess over M mu from N = 8 on, 8 % too low at N = 2; one worker waits for nobody.

    Args:
        workers: N, 1 or more.
        micro_batches: M.
        mean_s: mu, of one micro-batch, seconds.
        std_s: sigma, of one micro-batch, seconds.

    Example:
        >>> [round(expected_slowest(n, 1, 0.0, 1.0), 3) for n in (1, 2, 8, 64, 4096)]
        [0.0, 0.52, 1.459, 2.369, 3.637]
    """
    workers = check("workers", workers, Whole(1))
    excess = 0.0
    if workers > 1:
        tail = -_NORMAL.inv_cdf(1 / workers), -_NORMAL.inv_cdf(1 / (math.e * workers))
        excess = (1 - _EULER_GAMMA) * tail[0] + _EULER_GAMMA * tail[1]
    return micro_batches * mean_s + math.sqrt(micro_batches) * std_s * excess


def expected_micro_batches(
    tau: float, micro_batches: int, mean_s: float, std_s: float, *, finish_begun: bool = False
) -> float:
    """Return the expected micro-batches of one worker until ``tau``, for independent normal times.

        E[Mtilde(tau)] ~ sum_(m=1..M) Phi((tau - m mu) / (sqrt(m) sigma))

    Args:
        tau: compute threshold, seconds.
        micro_batches: M.
        mean_s: mu, of one micro-batch, seconds.
        std_s: sigma, of one micro-batch, seconds; 0 gives whole numbers.
        finish_begun: count the micro-batch that tau falls into, as our strategy does: 1 + the sum to M - 1.

    Example:
        >>> round(expected_micro_batches(10.0, 12, 1.0, 0.3), 3), expected_micro_batches(10.5, 12, 1.0, 0.0)
        (9.542, 10.0)
    """
    last = micro_batches - 1 if finish_begun else micro_batches
    return finish_begun + sum(_phi(tau - m * mean_s, math.sqrt(m) * std_s) for m in range(1, last + 1))


def _phi(distance: float, std: float) -> float:
    return _NORMAL.cdf(distance / std) if std > 0 else float(distance >= 0)


def expected_speedup(
    tau: float, workers: int, micro_batches: int, mean_s: float, std_s: float, other_s: float = 0.0
) -> float:
    """Return E[S_eff(tau)], the paper's closed form: idealised as :func:`ideal_speedup` is.

        (E[Mtilde] / M) (E[T] + T^c) / (min(tau, E[T]) + T^c)

    Example:
        >>> round(expected_speedup(12.0, 512, 12, 1.0, 0.3, 1.0), 3)
        1.175
    """
    slowest = expected_slowest(workers, micro_batches, mean_s, std_s)
    kept = expected_micro_batches(tau, micro_batches, mean_s, std_s) / micro_batches
    return kept * (slowest + other_s) / (min(tau, slowest) + other_s)
