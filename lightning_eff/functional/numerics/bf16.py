"""bfloat16: rounding to nearest, stochastic rounding, Kahan compensation and the lossless 16 + 16 bit split.

bfloat16 is the upper half of a float32, so every rule below is integer arithmetic on the 32 bits of a float32, in
which adding to the low half moves the magnitude away from zero for either sign.

A weight of 8 significant bits does not move when its update is below half a unit in the last place: 1.0 + 0.001 is
1.0. Three cures, each for any optimizer: round the updated weight up or down at random so that its mean is right
(:func:`bf16_stochastic_round`); remember what the rounding took away (:func:`kahan_step`); keep the lower half of the
float32 weight beside the bfloat16 one (:func:`split_fp32`).

References:
    Kalamkar, Mudigere, Mellempudi, Das et al., A Study of BFLOAT16 for Deep Learning Training, 2019,
    arXiv:1905.12322: the format, round to nearest even. Zamirai, Zhang, Aberger, De Sa, Revisiting BFloat16 Training,
    2020, arXiv:2010.06192: stochastic rounding and Kahan summation of the weight update. Split-SGD: Kalamkar et al.,
    Optimizing Deep Learning Recommender Systems Training on CPU Cluster Architectures, SC 2020, arXiv:2005.04680.
Differs: NaN and Inf are told apart before any rounding; stochastic rounding never reaches Inf from a finite number;
the split rounds (half away from zero) where Split-SGD truncates, so the model sees a nearest bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.functional.random import uniform_bits

_MAGNITUDE = 0x7FFFFFFF
_INF = 0x7F800000
_HIGH = -0x10000  # 0xFFFF0000 as int32: the bits that bfloat16 keeps
_QUIET = 0x400000  # the bit that makes a NaN quiet, and keeps it a NaN when the low half is cut off
_LARGEST = 0x7F7F0000  # 3.3895e38, the largest finite bfloat16


def _bits(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32).contiguous().view(torch.int32)


def _upper(bits: Tensor) -> Tensor:
    """The upper halves of int32 ``bits`` as bfloat16."""
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def _is_nan(bits: Tensor) -> Tensor:
    return (bits & _MAGNITUDE) > _INF


def bf16_round(x: Tensor) -> Tensor:
    """Round to the nearest bfloat16, ties to even; subnormals are kept.

    Args:
        x: any floating tensor; the arithmetic is float32.

    Returns:
        float32 tensor of the shape of ``x`` whose values are bfloat16 numbers. From 3.39618e38 on they are Inf.

    Example:
        >>> bf16_round(torch.tensor([1.00390625, 1.01171875, 3.14159274])).tolist()
        [1.0, 1.015625, 3.140625]
    """
    bits = _bits(x)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (torch.where(_is_nan(bits), bits | _QUIET, rounded) & _HIGH).view(torch.float32)


def bf16_stochastic_round(x: Tensor, seed: int) -> Tensor:
    """Round to one of the two neighbouring bfloat16 numbers with probabilities that make the mean ``x``.

    With f the low 16 bits of ``x``, the magnitude goes up with probability f / 65536 and down otherwise; what is a
    bfloat16 already stays. NaN and Inf stay; beyond the largest finite number the result is that number.

    Args:
        x: any floating tensor; the arithmetic is float32.
        seed: 64-bit seed of :func:`lightning_eff.functional.random.uniform_bits`.

    Returns:
        bfloat16 tensor of the shape of ``x``.

    Example:
        >>> x = torch.full((4096,), 1 + 3 / 1024)  # three eighths of the way from 1 to the next bfloat16
        >>> abs((bf16_stochastic_round(x, seed=1) > 1).float().mean().item() - 0.375) < 0.04
        True
    """
    bits = _bits(x)
    noise = (uniform_bits(bits.numel(), seed, device=bits.device) >> 16) & 0xFFFF
    rounded = (bits + noise.view(bits.shape)) & _HIGH
    rounded = torch.where((rounded & _MAGNITUDE) >= _INF, (rounded & ~_MAGNITUDE) | _LARGEST, rounded)
    special = torch.where(_is_nan(bits), bits | _QUIET, bits)
    return _upper(torch.where((bits & _MAGNITUDE) >= _INF, special, rounded))


def kahan_step(weight: Tensor, compensation: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """Add ``update`` to a bfloat16 weight and remember what the rounding took away.

        d = update + c;  w' = bf16(w + d);  c' = bf16(d - (w' - w))

    Args:
        weight: bfloat16.
        compensation: bfloat16, c of the step before; zeros at first.
        update: float32, what is to be added.

    Returns:
        The new weight and the new compensation, bfloat16. A compensation that is not finite becomes zero.

    Example:
        >>> w, c = torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
        >>> for _ in range(1000):
        ...     w, c = kahan_step(w, c, torch.tensor([1e-3]))
        >>> w.item()
        2.0

    References:
        Zamirai et al. 2020, Kahan summation of the weight update; here the sums are float32.
    """
    wide = weight.detach().to(torch.float32)
    d = update.detach().to(torch.float32) + compensation.to(torch.float32)
    new = (wide + d).to(torch.bfloat16)
    rest = d - (new.to(torch.float32) - wide)
    return new, torch.where(rest.isfinite(), rest, 0.0).to(torch.bfloat16)


def split_fp32(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into a nearest bfloat16 and the 16 bits that are missing; :func:`join_fp32` undoes it.

    ``hi = (bits + 0x8000) >> 16``, ``lo = bits - (hi << 16)``: round half away from zero. It differs from
    :func:`bf16_round` on exact ties alone, which is what makes it invertible. Finite numbers from 3.39618e38 on show
    as Inf, as in any rounding to nearest, and join to themselves. NaN is cut, not rounded, and stays NaN.

    Args:
        x: float32.

    Returns:
        ``hi`` bfloat16 and ``lo`` int16, both of the shape of ``x``. Every float32 but the signalling NaNs comes back
        to the bit from the two; signalling NaNs come back quiet.

    Example:
        >>> hi, lo = split_fp32(torch.tensor([1.00390625, 3.14159274]))
        >>> hi.tolist(), lo.tolist(), join_fp32(hi, lo).tolist()
        ([1.0078125, 3.140625], [-32768, 4059], [1.00390625, 3.1415927410125732])
    """
    bits = _bits(x)
    nan = _is_nan(bits)
    hi = torch.where(nan, bits | _QUIET, bits + 0x8000) & _HIGH
    lo = torch.where(nan, ((bits & 0xFFFF) ^ 0x8000) - 0x8000, bits - hi)
    return _upper(hi), lo.to(torch.int16)


def join_fp32(hi: Tensor, lo: Tensor) -> Tensor:
    """Return the float32 tensor that :func:`split_fp32` took apart.

    Args:
        hi: bfloat16.
        lo: int16, shape of ``hi``.
    """
    upper = hi.detach().contiguous().view(torch.int16).to(torch.int32) << 16
    lower = lo.to(torch.int32)
    return (upper + torch.where(_is_nan(upper), lower & 0xFFFF, lower)).view(torch.float32)
