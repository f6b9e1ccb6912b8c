"""DropCompute: stop computing when the step's time is up, reduce what there is, divide by what was computed.

Every worker does its part of a step as M micro-batches. Before it starts another one it looks at its own clock:

    start micro-batch m  <=>  elapsed_m <= tau   or   m < min_micro_batches                   (m = 0 .. M - 1)

``elapsed_m`` is the time its micro-batches 0 .. m - 1 took. A micro-batch once begun is finished and counts, so a
worker computes longer than tau by at most one micro-batch. All workers then reduce: the step lasts as long as its
slowest worker plus the time outside the loop. :func:`starts_next` is the decision, in training and in predictions.

Legend: I ``steps``, N ``workers``, M ``micro-batches`` per worker and step; ``table`` is t (I, N, M), the seconds of
every micro-batch; ``other`` is T^c (I,), the seconds of every step outside the micro-batch loop; tau the compute
threshold in seconds; k a worker's count of computed micro-batches. Tables are float64 on the CPU.

References:
    Giladi, Gottlieb, Shkolnik, Karnieli, Banner, Hoffer, Levy, Soudry, DropCompute: simple and more robust distributed
    synchronous training via compute variance reduction, NeurIPS 2023, arXiv:2306.10598: algorithm 1 (step), algorithm 2
    (threshold, :mod:`lightning_eff.functional.stragglers.model`).
Differs: the paper's model stops a worker at tau exactly; here the begun micro-batch is finished, as in any training
    loop, and every prediction says so. At least ``min_micro_batches`` are computed, so that a stalled loader cannot
    empty a step. The gradient may be divided by what was computed (``"computed"``); the published code divides by the
    most that could have been (``"maximum"``), which shrinks it by the drop rate.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from lightning_eff.checks import Choice, Real, Whole, check
from lightning_eff.errors import ConfigurationError

Normalize = Literal["computed", "maximum"]
NORMALIZE = Choice(*get_args(Normalize))


class Timings(NamedTuple):
    """What a run without dropping took, in seconds; made by :func:`check_timings`.

    Attributes:
        table: t, every micro-batch; float64 (I, N, M).
        other: T^c, every step outside the micro-batch loop (all-reduce, optimizer, ...); float64 (I,).
    """

    table: Tensor
    other: Tensor


MAX_DROP_RATE = 0.1
"""What a threshold may drop at most unless asked otherwise; the paper saw no loss of accuracy up to there."""


def check_timings(table: Tensor, other: Tensor | float = 0.0) -> Timings:
    """Return both as float64 on the CPU, ``other`` with one value per step.

    Args:
        table: seconds, any real dtype, (I, N, M), none of them 0; finite, not negative, not all zero.
        other: seconds, (I,), or a number for all steps; finite, not negative.

    Raises:
        ConfigurationError: a shape or a value is not allowed; the first bad cell is named.

    Example:
        >>> check_timings(torch.ones(2, 3, 4), 0.5).other
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    table = table.detach().to("cpu", torch.float64)
    if table.dim() != 3 or table.numel() == 0:
        raise ConfigurationError(f"A timing table has shape (steps, workers, micro-batches); got {tuple(table.shape)}.")
    # A number goes to float64 directly: by way of the default dtype it would lose its last digits.
    other = torch.as_tensor(other, dtype=torch.float64, device="cpu").detach()
    if other.shape not in {(), (len(table),)}:
        raise ConfigurationError(f"other has one value for each of {len(table)} steps; got shape {tuple(other.shape)}.")
    for name, values in (("micro-batch (step, worker, micro-batch)", table), ("other time (step)", other)):
        bad = (~(values >= 0) | values.isinf()).nonzero()
        if len(bad):
            raise ConfigurationError(
                f"The seconds of a {name} are finite and not negative; at {tuple(bad[0].tolist())} they are "
                f"{float(values[tuple(bad[0])])!r}."
            )
    if not bool(table.any()):
        raise ConfigurationError("Every micro-batch of the timing table took 0 seconds; nothing was measured.")
    return Timings(table, other.expand(len(table)).contiguous())


def check_min_micro_batches(min_micro_batches: int, micro_batches: int | None = None) -> int:
    """Return ``min_micro_batches``; a ConfigurationError unless it is 0 or more, and not above M where M is given."""
    least = Whole() if micro_batches is None else Whole(0, micro_batches, "the micro-batches of a step")
    return int(check("min_micro_batches", min_micro_batches, least))


@overload
def starts_next(elapsed_s: float, done: int, *, tau: float, min_micro_batches: int = 1) -> bool: ...
@overload
def starts_next(elapsed_s: Tensor, done: Tensor, *, tau: float, min_micro_batches: int = 1) -> Tensor: ...
def starts_next(
    elapsed_s: float | Tensor, done: int | Tensor, *, tau: float, min_micro_batches: int = 1
) -> bool | Tensor:
    """Return whether a worker starts another micro-batch of this step: the decision, and all of it.

    Args:
        elapsed_s: what its micro-batches of this step took so far, seconds; one number, or a tensor of them.
        done: how many it has computed in this step; likewise.
        tau: compute threshold in seconds; inf never stops.
        min_micro_batches: computed however late it is.

    Example:
        >>> [starts_next(elapsed, done, tau=2.0) for done, elapsed in enumerate((0.0, 1.5, 2.0, 2.5))]
        [True, True, True, False]
        >>> starts_next(9.0, 0, tau=2.0)  # a stalled loader
        True
    """
    return (done < min_micro_batches) | (elapsed_s <= tau)


def completed(times: Tensor, tau: float, min_micro_batches: int = 1) -> Tensor:
    """Return the number of micro-batches every worker computes: :func:`starts_next` before each of them.

    Args:
        times: seconds of the micro-batches in order, not negative; (..., M).
        tau: compute threshold in seconds.
        min_micro_batches: computed however late a worker is.

    Returns:
        int64 of shape (...).

    Example:
        >>> completed(torch.tensor([[1.0, 1.0, 1.0], [1.0, 9.0, 1.0]]), tau=2.5).tolist()
        [3, 2]
    """
    min_micro_batches = check_min_micro_batches(min_micro_batches)
    elapsed = _ends(times)[..., :-1]
    done = torch.arange(times.shape[-1], device=times.device, dtype=torch.int64)
    # Elapsed time never shrinks: a worker that does not start m starts none of the later ones.
    return starts_next(elapsed, done, tau=tau, min_micro_batches=min_micro_batches).sum(-1)


def _ends(times: Tensor) -> Tensor:
    """The time at which 0, 1, .. M micro-batches are done; (..., M) -> (..., M + 1)."""
    return torch.nn.functional.pad(times.cumsum(-1), (1, 0))


def compute_times(times: Tensor, counts: Tensor) -> Tensor:
    """Return the seconds every worker computes: the end of the last micro-batch it began; (..., M), (...) -> (...)."""
    return _ends(times).gather(-1, counts.unsqueeze(-1)).squeeze(-1)


def step_times(timings: Timings, counts: Tensor) -> Tensor:
    """Return the seconds of every step: its slowest worker and the time outside the loop; counts (I, N) -> (I,).

    Example:
        >>> timings = check_timings(torch.tensor([[[1.0, 1.0, 1.0], [1.0, 9.0, 1.0]]]), other=0.5)
        >>> step_times(timings, completed(timings.table, tau=1.5)).item()
        10.5
    """
    return compute_times(timings.table, counts).amax(-1) + timings.other


def gradient_factor(
    counts: Tensor, micro_batches: int, normalize: Normalize = "computed", *, window: int | None = None
) -> Tensor:
    """Return the factor for the gradient that was summed over all workers and their computed micro-batches.

    Lightning has divided the loss of every micro-batch by M = ``micro_batches``, so the sum is (1/M) sum_n sum_m g.
    With W = ``window``

        computed:  W / sum_n k_n     a mean over the micro-batches that were computed          (W = M)
        maximum:   1 / N             every dropped micro-batch counts as a zero gradient

    Both are 1 / N, to the last bit, when nothing was dropped.

    Args:
        counts: k, computed micro-batches per worker, any real dtype; (N,).
        micro_batches: M, the ``accumulate_grad_batches`` every loss was divided by.
        normalize: ``"computed"`` or ``"maximum"``.
        window: micro-batches of this step; less than M in the last step of an epoch that does not divide by M.
            Lightning divides the losses of such a step by M all the same, and the result leaves that as it is: only
            what was dropped is made good. Default M: the mean over what was computed, in a short step as well.

    Returns:
        0-d float64 tensor on the device of ``counts``: no synchronisation. 0 if nothing at all was computed.

    Raises:
        ConfigurationError: ``normalize`` is not known or ``window`` not in 1 .. M.

    Example:
        >>> gradient_factor(torch.tensor([4, 2]), 4).item() * (4 + 2) / 4  # six equal gradients, each divided by M = 4
        1.0
        >>> gradient_factor(torch.tensor([4, 2]), 4, "maximum").item()
        0.5
    """
    micro_batches = check("micro_batches", micro_batches, Whole(1))
    window = micro_batches if window is None else window
    normalize = check("normalize", normalize, NORMALIZE)
    window = check("window", window, Whole(1, micro_batches, "the micro-batches of a step"))
    total = counts.sum(dtype=torch.float64)
    # Tensor by tensor: torch takes a number divided by a tensor as a product with the reciprocal, rounded twice.
    divided, by = (window, total) if normalize == "computed" else (1, torch.full_like(total, counts.numel()))
    factor = torch.full_like(total, divided) / by
    return torch.where(total > 0, factor, 0.0)


def extra_steps(steps: int, drop_rate: float) -> int:
    """Return how many further steps it takes for as many samples as in ``steps`` without dropping: R of section 3.

    Example:
        >>> extra_steps(900, 0.1)
        100
    """
    return _scaled_up(steps, drop_rate) - steps


def extra_micro_batches(micro_batches: int, drop_rate: float) -> int:
    """Return how many further micro-batches a step needs for as many computed samples, with tau chosen anew.

    Example:
        >>> extra_micro_batches(12, 0.127)
        2
    """
    return _scaled_up(micro_batches, drop_rate) - micro_batches


def _scaled_up(number: int, drop_rate: float) -> int:
    """``number / (1 - drop_rate)``, rounded up unless the division alone made it more than a whole number."""
    drop_rate = check("drop_rate", drop_rate, Real(0, 1, below=True))
    return math.ceil(number / (1 - drop_rate) * (1 - 1e-12))
