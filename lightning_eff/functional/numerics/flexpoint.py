"""Flexpoint: integer tensors with one shared exponent each, and Autoflex, which predicts that exponent.

    x ~ m * kappa,   m = clamp(round(x / kappa), -2^(N-1), 2^(N-1) - 1),   kappa a power of two

Rounding is to nearest, ties to even. A tensor with NaN or Inf gets the scale NaN, so that the damage stays visible.

The exponent of an output must be known before the operation runs, so it comes from the writes before. Gamma is the
largest |m| of a write, phi = Gamma * kappa its value, f the last l values of phi, and after every write

    Gamma >= 2^(N-1) - 1:   forget f;  Gamma <- 2 Gamma                                                       (overflow)
    chi   = alpha * (max(f) + beta * std(f) + gamma * kappa)                                             (predicted max)
    kappa <- 2^(ceil(log2 chi) - N + 1)

Legend: N ``bits``, kappa ``scale``, l ``length``; alpha is headroom, beta weighs the population standard deviation,
gamma counts in units of kappa. A constant maximum settles where Gamma + gamma is in [2^(N-3), 2^(N-2)].

References:
    Koester et al., Flexpoint: An Adaptive Numerical Format for Efficient Training of Deep Neural Networks, NIPS 2017,
    arXiv:1711.02213, sections 3.1 (format), 3.2 (initialisation), 3.3 (Autoflex).
Differs: Gamma is rounded from the true maximum of a write, not from the saturated integers, so that one overflow is
    enough to find the new exponent; stochastic rounding is offered; the special rule of the published code for tensors
    that are seldom updated is left out. Its floor without headroom is alpha = 1 here, one bit less.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_eff.checks import Choice, Real, Rule, Whole, check
from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.codes import TINY, Codes
from lightning_eff.functional.random import draw_seed, uniform
from lightning_eff.methods.state import AUTOFLEX, read_estimate

IntegerRounding = Literal["nearest", "stochastic"]
BITS, ROUNDING = Whole(4, 16), Choice(*get_args(IntegerRounding))
ALPHA, BETA, GAMMA = Real(0, 2.0**16, above=True), Real(0, 2.0**16), Real(0, 2.0**31, above=True)
"""Beyond the whole range of 16 bits no tensor would have a code but zero."""
LENGTH = Whole(1, 1_024, "the paper's is 16; all of it is kept, saved, and gone through at every write")
_EXPONENT = Whole(-126, 100)
_RULES: Mapping[str, Rule] = MappingProxyType({
    "alpha": ALPHA, "beta": BETA, "gamma": GAMMA, "length": LENGTH, "bits": BITS,
    "min_exponent": _EXPONENT, "max_exponent": _EXPONENT,
})  # fmt: skip
INIT_ROUNDS = 10
"""Rounds of the initialisation before it gives up."""
_FLOAT32_MAX = torch.finfo(torch.float32).max


def check_integer_format(bits: int, rounding: str = "nearest") -> None:
    """Raise a ConfigurationError unless both are allowed; 16 bits is what the codes' int16 holds."""
    check("bits", bits, BITS)
    check("rounding", rounding, ROUNDING)


def integer_codes(
    x: Tensor,
    scale: Tensor | float,
    *,
    bits: int = 16,
    symmetric: bool = False,
    rounding: IntegerRounding = "nearest",
    seed: int | None = None,
) -> Codes:
    """Round to integers in units of a given scale, saturating: what both shared-exponent formats store.

    Args:
        x: any floating tensor; the arithmetic is float32, exact up to the rounding asked for.
        scale: what one unit is worth, a power of two in 2^-126 .. 2^100; 0-d float32 or a number.
        bits: N, 4..16.
        symmetric: leave out -2^(N-1), so that the codes of -x are those of x, negated.
        rounding: ``"nearest"``, ties to even, or ``"stochastic"``: up with the probability of the fraction.
        seed: 64-bit seed of the stochastic rounding; default: one draw from torch's global generator.

    Returns:
        int16 codes of the shape of ``x`` and the scale, a tensor of its own; all zero and NaN when ``x`` holds NaN or
        Inf or the scale is one.

    Raises:
        ConfigurationError: ``bits`` or ``rounding`` is not allowed.
    """
    check_integer_format(bits, rounding)
    x = x.detach().to(torch.float32)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    top = 2 ** (bits - 1) - 1
    y = (x * (1 / scale)).clamp(-top if symmetric else -top - 1, top)
    if rounding == "nearest":
        y = y.round()
    else:
        u = uniform(x.numel(), draw_seed() if seed is None else seed, device=x.device).view(x.shape)
        lower = y.abs().floor()
        y = torch.copysign(lower + (u < y.abs() - lower).to(y.dtype), y)
    sound = x.isfinite().all() & scale.isfinite()
    return Codes(torch.where(sound, y, 0.0).to(torch.int16), torch.where(sound, scale, torch.nan))


def round_to_scale(x: Tensor, scale: Tensor | float, *, bits: int = 16) -> Tensor:
    """Round every element to the nearest multiple of ``scale``, saturating; NaN and Inf stay where they are.

    The element-wise sibling of :func:`flex_quantize`, equal to it on finite tensors.

    Args:
        x: any floating tensor; the arithmetic is float32.
        scale: see :func:`integer_codes`; NaN makes every finite element NaN.
        bits: N, 4..16.

    Returns:
        Shape and dtype of ``x``. In bfloat16 the largest value rounds up to 2^(N-1) * scale where N - 1 > 8; every
        other result of a bfloat16 ``x`` is exact.

    Raises:
        ConfigurationError: ``bits`` is not allowed.

    Example:
        >>> round_to_scale(torch.tensor([0.3, -9.0, torch.inf]), 0.25, bits=4)
        tensor([ 0.2500, -2.0000,     inf])
    """
    check_integer_format(bits)
    wide = x.detach().to(torch.float32)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    y = (wide * (1 / scale)).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).round()
    return torch.where(wide.isfinite(), y * scale + 0.0, wide).to(x.dtype)  # + 0.0: integers have no -0


def flex_codes(
    x: Tensor,
    scale: Tensor | float,
    *,
    bits: int = 16,
    rounding: IntegerRounding = "nearest",
    seed: int | None = None,
) -> Codes:
    """Quantise to flexN with a scale known beforehand; what lies beyond the range saturates.

    16-bit weights lose the updates below kappa / 2 when they are rounded to nearest; stochastic rounding keeps them in
    the mean.

    Args:
        x: any floating tensor; the arithmetic is float32.
        scale: kappa, a power of two in 2^-126 .. 2^100; 0-d float32 or a number. Usually ``Autoflex.scale``.
        bits: N, 4..16.
        rounding: ``"nearest"`` or ``"stochastic"``.
        seed: 64-bit seed of the stochastic rounding; default: one draw from torch's global generator.

    Returns:
        int16 codes in -2^(N-1) .. 2^(N-1) - 1 of the shape of ``x``, and kappa; all zero and NaN when ``x`` holds NaN
        or Inf.

    Raises:
        ConfigurationError: ``bits`` or ``rounding`` is not allowed.

    Example:
        >>> codes, scale = flex_codes(torch.tensor([1.0, -0.3, 0.125, 99.0]), 0.25, bits=8)
        >>> codes.tolist(), scale.item()
        ([4, -1, 0, 127], 0.25)

    References:
        Koester et al. 2017, section 3.1. Differs: the paper does not say which way ties go; here to even.
    """
    return integer_codes(x, scale, bits=bits, rounding=rounding, seed=seed)


def flex_quantize(
    x: Tensor,
    scale: Tensor | float,
    *,
    bits: int = 16,
    rounding: IntegerRounding = "nearest",
    seed: int | None = None,
) -> Tensor:
    """Quantise and dequantise: the values of :func:`flex_codes`, in the dtype of ``x``; all NaN for a broken tensor.

    Args:
        x: any floating tensor.
        scale: see :func:`flex_codes`, as the other arguments.
        bits: see there.
        rounding: see there.
        seed: see there.
    """
    return flex_codes(x, scale, bits=bits, rounding=rounding, seed=seed).dequantize(x.dtype)


def autoflex_round(max_abs: float, scale: float, *, bits: int = 16) -> tuple[float, bool]:
    """Do one round of the initialisation: return the next scale, and whether it is final.

    Args:
        max_abs: largest magnitude of the tensor.
        scale: kappa of this round.
        bits: N.
    """
    limit = 2 ** (bits - 1) - 1
    gamma = min(round(max_abs / scale), limit)
    if gamma == limit:
        return scale * 2.0 ** ((bits - 1) // 2), False
    if gamma >= 2 ** (bits - 2):
        return scale, True
    # A jump so that Gamma fills N - 1 bits; from few bits it is not reliable, so that another round checks it.
    used = max(gamma.bit_length(), 1)
    return scale * 2.0 ** (used - (bits - 1)), gamma >= 2.0 ** ((bits - 1) // 2 - 2)


def autoflex_init(max_abs: float, *, bits: int = 16) -> float:
    """Find the scale of a tensor that has no history in a few rounds of trying one.

    The rounds depend on the tensor through its maximum alone, so that one pass over it is enough.

    Args:
        max_abs: largest magnitude, finite.
        bits: N, 4..16.

    Returns:
        kappa, a power of two of 2^-126 or more, not limited to the exponents of the format (:class:`Autoflex` does
        that in its updates). 1 when the rounds were not enough: for zeros, and with N = 16 outside 2^-121 .. 2^78.

    Raises:
        ConfigurationError: ``bits`` is not allowed.

    Example:
        >>> autoflex_init(0.003) == 2.0**-23, autoflex_init(3e5), autoflex_init(0.0)
        (True, 16.0, 1.0)

    References:
        Koester et al. 2017, section 3.2, with the constants of the published code.
    """
    check_integer_format(bits)
    scale = 1.0
    for _ in range(INIT_ROUNDS):
        scale, done = autoflex_round(max_abs, scale, bits=bits)
        if done:
            return max(scale, TINY)
    return 1.0


def predicted_max(history: Sequence[float], scale: float, *, alpha: float, beta: float, gamma: float) -> float:
    """Return chi, the largest magnitude to expect of the next write: ``alpha * (max + beta * std + gamma * scale)``.

    Args:
        history: f, the largest magnitudes of the writes before; at least one.
        scale: kappa of the last write.
        alpha: see :class:`Autoflex`, as ``beta`` and ``gamma``.
        beta: see there.
        gamma: see there.

    References:
        Koester et al. 2017, section 3.3.
    """
    mean = math.fsum(history) / len(history)
    variance = math.fsum((phi - mean) ** 2 for phi in history) / len(history)  # the population's: divided by n
    return alpha * (max(history) + beta * math.sqrt(variance) + gamma * scale)


@dataclass
class Autoflex:
    """The predicted scale of one tensor, from the maxima of the times it was written before.

    Call :meth:`initialise` once, store every write with ``scale``, then call :meth:`update` with its maximum. A buffer
    that several operations write to needs one Autoflex per operation; in a process group all ranks must be given the
    same maximum (the largest of theirs), or their scales drift apart.

    Args:
        alpha: headroom, a factor above 0, at most 2^16.
        beta: weight of the standard deviation, 0 .. 2^16.
        gamma: added to the maximum in units of kappa, above 0, at most 2^31; with it a tensor of zeros has a scale that
            shrinks.
        length: l, writes looked back on, 1 .. 1,024.
        bits: N, 4..16.
        min_exponent: kappa >= 2^min_exponent. The default and that of ``max_exponent`` are those of flex16+5; a tensor
            whose maximum lies outside about 2^-18 .. 2^14 needs others.
        max_exponent: kappa <= 2^max_exponent, -126 <= min_exponent <= max_exponent <= 100.

    Attributes:
        scale: kappa of the next write. The one of :meth:`initialise` is not limited by the exponents, every later is.
        history: f, the maxima of the last writes, oldest first.
        overflows: number of writes whose Gamma reached 2^(N-1) - 1.
        initialised: whether :meth:`initialise` has seen a finite tensor.

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> flex = Autoflex()
        >>> flex.initialise(1.0)
        >>> [(flex.update(1.0), flex.scale) for _ in range(2)]
        [(False, 0.0001220703125), (False, 0.0001220703125)]
        >>> flex.update(5.0), flex.scale, flex.overflows
        (True, 0.0009765625, 1)

    References:
        Koester et al. 2017, section 3.3; alpha, beta, gamma and l are the paper's.
    """

    alpha: float = 2.0
    beta: float = 3.0
    gamma: float = 100.0
    length: int = 16
    bits: int = 16
    min_exponent: int = -32
    max_exponent: int = 0
    scale: float = field(default=1.0, init=False)
    history: deque[float] = field(init=False)
    overflows: int = field(default=0, init=False)
    initialised: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            setattr(self, name, check(name, getattr(self, name), rule))
        if self.min_exponent > self.max_exponent:
            raise ConfigurationError(
                f"min_exponent={self.min_exponent!r}, max_exponent={self.max_exponent!r} is not allowed; "
                f"use -126 <= min_exponent <= max_exponent <= 100."
            )
        self.history = deque(maxlen=self.length)

    def initialise(self, max_abs: float) -> None:
        """Take the scale of :func:`autoflex_init` and forget the history; a non-finite maximum changes nothing."""
        if max_abs <= _FLOAT32_MAX:
            self.scale, self.initialised = autoflex_init(max_abs, bits=self.bits), True
            self.history.clear()

    def update(self, max_abs: float) -> bool:
        """Take in a write and predict the scale of the next.

        Args:
            max_abs: largest magnitude that was to be written, before it saturated; written with ``scale``. A value
                that is no finite float32 changes nothing.

        Returns:
            Whether the write overflowed: its maximum was at the end of the range or beyond.
        """
        if not max_abs <= _FLOAT32_MAX:
            return False
        largest = round(max_abs / self.scale)  # Gamma
        overflow = largest >= (1 << (self.bits - 1)) - 1
        if overflow:  # as if one more bit had been needed
            self.history.clear()
            self.overflows += 1
            largest *= 2
        self.history.append(largest * self.scale)
        chi = predicted_max(self.history, self.scale, alpha=self.alpha, beta=self.beta, gamma=self.gamma)
        mantissa, exponent = math.frexp(chi)  # chi = mantissa * 2^exponent with mantissa in [1/2, 1)
        exponent -= (mantissa == 0.5) + self.bits - 1
        self.scale = math.ldexp(1.0, min(max(exponent, self.min_exponent), self.max_exponent))
        return overflow

    def state_dict(self) -> dict[str, Any]:
        """Return scale, history and counters as plain numbers; :meth:`load_state_dict` continues from them exactly."""
        return {
            "scale": self.scale,
            "history": list(self.history),
            "overflows": self.overflows,
            "initialised": self.initialised,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`; of a history longer than ``length`` the newest values stay.

        Raises:
            CheckpointError: it is no such state; nothing is changed.
        """
        found = read_estimate(AUTOFLEX, state, of="Autoflex")
        self.scale, self.overflows, self.initialised = found["scale"], found["overflows"], found["initialised"]
        self.history = deque(found["history"], maxlen=self.length)
