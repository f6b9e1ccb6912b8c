"""Floating-point formats of up to eight bits: every split into sign, e exponent and m mantissa bits.

A code ``s.E.M`` stands for

    E > 0:  (-1)^s * 2^(E - bias) * (1 + M / 2^m)          normal
    E = 0:  (-1)^s * 2^(1 - bias) * M / 2^m                subnormal

With e = 0 there is no exponent field and all values are ``M * 2^(1 - bias - m)``: fixed point. Which codes are no
numbers is ``special``: none of them (``"none"``), all ones alone, a NaN (``"fn"``, as in the OCP's E4M3), or the whole
top exponent, Inf and NaN (``"ieee"``, as in E5M2).

Rounding works on ``y = |x| / step``, where ``step = 2^(max(floor(log2 |x|), 1 - bias) - m)`` is the spacing of the
format around x. It comes from the exponent field of x, so ``y`` and ``round(y) * step`` are exact and the only
rounding is the one asked for; subnormals need no case of their own. ``round(y) + (E - 1) * 2^m`` is the code.

References:
    Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv:2209.05433, table 1 (E4M3, E5M2).
    Open Compute Project, OCP Microscaling Formats (MX) v1.0, 2023, sections 5.3.1 to 5.3.3.
Differs: any bias; formats with no special code for the splits no standard defines; m = 0 ties (see
:func:`quantize`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_eff.checks import Choice, Maybe, Rule, Whole, check, checked
from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.random import draw_seed, uniform

Special = Literal["none", "fn", "ieee"]
FloatRounding = Literal["nearest", "stochastic"]
Infinity = Literal["propagate", "saturate"]
_RULES: dict[str, Rule] = {
    "exponent_bits": Whole(0, 7),
    "mantissa_bits": Whole(0, 7),
    "bias": Maybe(Whole(-1000, 1000)),
    "special": Choice(*get_args(Special)),
}
ROUNDING, INFINITY = Choice(*get_args(FloatRounding)), Choice(*get_args(Infinity))
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class FloatFormat:
    """A format of ``1 + exponent_bits + mantissa_bits <= 8`` bits.

    Args:
        exponent_bits: e, 0..7; 0 is fixed point.
        mantissa_bits: m, 0..7.
        bias: exponent bias; ``-1`` and below are allowed. Default: ``2^(e-1) - 1``, and 0 for e = 0.
        special: ``"none"``: every code is a number; ``"fn"``: all ones is NaN; ``"ieee"``: the top exponent is Inf
            (M = 0) and NaN.

    Raises:
        ConfigurationError: more than eight bits, no magnitude bit, too few bits for ``special``, or a bias that puts
            a value outside the normal range of float32 (2^-126 .. 2^100).

    Example:
        >>> E4M3.max, E4M3.min_normal, E4M3.min_subnormal
        (448.0, 0.015625, 0.001953125)
        >>> FloatFormat(3, 0).values.tolist()[-8:]
        [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int | None = None
    special: Special = "none"

    def __post_init__(self) -> None:
        for name, value in checked(_RULES, self.__dict__).items():
            object.__setattr__(self, name, value)
        e, m = self.exponent_bits, self.mantissa_bits
        if not 1 <= e + m <= 7:
            raise ConfigurationError(
                f"exponent_bits={e!r}, mantissa_bits={m!r} is not allowed; with the sign they must make 2 to 8 bits."
            )
        if (self.special == "fn" and (e < 1 or e + m < 2)) or (self.special == "ieee" and (e < 2 or m < 1)):
            raise ConfigurationError(f"E{e}M{m} has too few bits for special={self.special!r}; use special='none'.")
        if self.bias is None:
            object.__setattr__(self, "bias", (1 << (e - 1)) - 1 if e else 0)
        if not (self.min_exponent - m >= -126 and self.max < 2.0**101):
            raise ConfigurationError(f"bias={self.bias!r} puts values of E{e}M{m} outside 2^-126 .. 2^100.")

    @property
    def bits(self) -> int:
        """Number of bits of a code, with the sign."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number, ``1 - bias``."""
        return 1 - int(self.bias or 0)

    @property
    def max_code(self) -> int:
        """Code of the largest finite number."""
        codes = 1 << (self.bits - 1)
        return codes - {"none": 1, "fn": 2, "ieee": (1 << self.mantissa_bits) + 1}[self.special]

    @property
    def max(self) -> float:
        """Largest finite number."""
        return self._magnitude(self.max_code)

    @property
    def min_normal(self) -> float:
        """Smallest number with full precision, ``2^(1 - bias)``; with e = 0 (no normal number) where it would be."""
        return 2.0**self.min_exponent

    @property
    def min_subnormal(self) -> float:
        """Smallest positive number (the spacing around zero)."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    @property
    def inf_code(self) -> int | None:
        """Code of +Inf, if the format has one."""
        return self.max_code + 1 if self.special == "ieee" else None

    @property
    def nan_code(self) -> int | None:
        """Code that NaN is written as (all ones below the sign), if the format has one."""
        return None if self.special == "none" else (1 << (self.bits - 1)) - 1

    @property
    def table(self) -> Tensor:
        """Value of every code, float32 of shape ``(2^bits,)``; the sign is the highest bit."""
        return _table(self)

    @property
    def values(self) -> Tensor:
        """Every finite value once, sorted, float32."""
        half = self.table[: self.max_code + 1]
        return torch.cat([-half[1:].flip(0), half])

    def scaled(self, octaves: int) -> FloatFormat:
        """Return the format whose values are 2^octaves times these, as far as float32 allows; special codes are kept.

        Example:
            >>> FloatFormat(3, 2).max, FloatFormat(3, 2).scaled(-4).max
            (28.0, 1.75)
        """
        lowest, highest = (1 << self.exponent_bits) - 100, 127 - self.mantissa_bits
        bias = min(max(int(self.bias or 0) - octaves, lowest), highest)
        return FloatFormat(self.exponent_bits, self.mantissa_bits, bias, self.special)

    def _magnitude(self, code: int) -> float:
        field, mantissa = divmod(code, 1 << self.mantissa_bits)
        hidden = (1 << self.mantissa_bits) if field else 0
        return (hidden + mantissa) * 2.0 ** (self.min_exponent - self.mantissa_bits + max(field - 1, 0))


E4M3 = FloatFormat(4, 3, special="fn")
"""OCP E4M3 (torch's ``float8_e4m3fn``): bias 7, max 448, no Inf, one NaN per sign."""
E5M2 = FloatFormat(5, 2, special="ieee")
"""OCP E5M2 (torch's ``float8_e5m2``): bias 15, max 57344, Inf and NaN."""


@functools.cache
def _table(fmt: FloatFormat) -> Tensor:
    count = 1 << (fmt.bits - 1)
    half = [fmt._magnitude(code) if code <= fmt.max_code else float("nan") for code in range(count)]
    if fmt.inf_code is not None:
        half[fmt.inf_code] = float("inf")
    return torch.tensor(half + [-value for value in half], dtype=torch.float32, device="cpu")


def check_choices(rounding: str, infinity: str) -> None:
    """Raise a ConfigurationError unless both are known choices."""
    check("rounding", rounding, ROUNDING)
    check("infinity", infinity, INFINITY)


def _exponent_part(a: Tensor) -> Tensor:
    """2^floor(log2 a) of a >= 0 from the exponent field alone (0 for subnormal a, Inf for NaN)."""
    if a.dtype == torch.float64:
        return (a.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return (a.view(torch.int32) & 0x7F800000).view(torch.float32)


def _rounded(x: Tensor, fmt: FloatFormat, rounding: FloatRounding, seed: int | None) -> tuple[Tensor, Tensor]:
    """Return ``round(y)`` and ``2^max(floor(log2 |x|), 1 - bias)``; saturated, NaN where x is NaN."""
    a = x.abs().clamp(max=fmt.max)
    power = _exponent_part(a).clamp(min=fmt.min_normal)
    y = a / power * 2.0**fmt.mantissa_bits
    if rounding == "nearest":
        return y.round(), power
    u = uniform(x.numel(), draw_seed() if seed is None else seed, device=x.device).view(x.shape)
    lower = y.floor()
    return lower + (u < y - lower).to(y.dtype), power


def quantize(
    x: Tensor,
    fmt: FloatFormat,
    *,
    rounding: FloatRounding = "nearest",
    seed: int | None = None,
    infinity: Infinity = "propagate",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Round every element to a value of ``fmt``.

    Finite values beyond the largest become the largest. NaN stays NaN. The sign of zero is kept.

    Args:
        x: float16, bfloat16, float32 or float64; the arithmetic is exact in each.
        fmt: the format.
        rounding: ``"nearest"``, ties to the even multiple of the spacing (which is the even code; without mantissa
            bits it is the power of two above, and zero below the smallest number), or ``"stochastic"``: up with the
            probability ``(|x| - l) / (u - l)`` between the neighbours l and u, unbiased up to the maximum.
        seed: 64-bit seed of the stochastic rounding; default: one draw from torch's global generator.
        infinity: ±Inf stays ±Inf (``"propagate"``) or becomes the largest value (``"saturate"``).
        dtype: of the result; default: that of ``x``. Every format is exact in bfloat16, float32 and float64; in
            float16 values beyond 65504 become Inf.

    Raises:
        ConfigurationError: ``rounding`` or ``infinity`` is not known.

    Example:
        >>> quantize(torch.tensor([1.0625, 1.1875, 17.0, 3.3, 1e9]), E4M3)
        tensor([  1.0000,   1.2500,  16.0000,   3.2500, 448.0000])
    """
    check_choices(rounding, infinity)
    wide = x.detach() if x.dtype in _WIDE else x.detach().to(torch.float32)
    y, power = _rounded(wide, fmt, rounding, seed)
    q = torch.copysign(y * (power * 2.0**-fmt.mantissa_bits), wide)
    if infinity == "propagate":
        q = torch.where(wide.isinf(), wide, q)
    return q.to(dtype or x.dtype)


def encode(
    x: Tensor,
    fmt: FloatFormat,
    *,
    rounding: FloatRounding = "nearest",
    seed: int | None = None,
    infinity: Infinity = "propagate",
) -> Tensor:
    """Round as :func:`quantize` does and return the codes.

    Args:
        x: see :func:`quantize`, as the other arguments.
        fmt: the format.
        rounding: see there.
        seed: see there.
        infinity: with ``"propagate"`` ±Inf becomes the code of ±Inf, or NaN in a format without Inf.

    Returns:
        uint8 of the shape of ``x``; codes shorter than eight bits lie in the low bits.

    Raises:
        ConfigurationError: ``rounding`` or ``infinity`` is not known, or ``x`` holds a NaN (or an Inf to propagate)
            and the format has no code for it.

    Example:
        >>> encode(torch.tensor([240.0, -448.0, 2.0**-9]), E4M3).tolist()
        [119, 254, 1]
    """
    check_choices(rounding, infinity)
    wide = x.detach() if x.dtype in _WIDE else x.detach().to(torch.float32)
    y, power = _rounded(wide, fmt, rounding, seed)
    field = torch.frexp(power.to(torch.float32))[1] - (fmt.min_exponent + 1)  # 0 at and below the smallest normal
    code = y.nan_to_num(0.0).to(torch.int32) + field * (1 << fmt.mantissa_bits)
    bad = wide.isnan() | wide.isinf() if infinity == "propagate" else wide.isnan()
    if fmt.nan_code is None:
        if bool(bad.any()):
            raise unencodable(fmt)
    else:
        code = torch.where(bad, fmt.nan_code, code)
        if fmt.inf_code is not None and infinity == "propagate":
            code = torch.where(wide.isinf(), fmt.inf_code, code)
    return (code + torch.signbit(wide) * (1 << (fmt.bits - 1))).to(torch.uint8)


def unencodable(fmt: FloatFormat) -> ConfigurationError:
    """Return the error for a NaN or Inf that ``fmt`` has no code for."""
    return ConfigurationError(
        f"The tensor holds NaN or Inf and E{fmt.exponent_bits}M{fmt.mantissa_bits} with special='none' has no code for "
        f"it; use special='fn', or infinity='saturate' if only Inf is expected."
    )


def decode(codes: Tensor, fmt: FloatFormat, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values of ``codes`` (uint8, any shape), exact in bfloat16, float32 and float64.

    Example:
        >>> decode(torch.tensor([0x7E, 0x7F, 0x81], dtype=torch.uint8), E4M3)
        tensor([ 4.4800e+02,         nan, -1.9531e-03])
    """
    return fmt.table.to(codes.device, dtype)[codes.to(torch.int64)]
