"""DFP-16, dynamic fixed point: int16 tensors with one shared exponent each, taken from their own maximum.

    x ~ i * 2^E,   E = floor(log2 max|x|) - (P - 2),   i = clamp(round(x * 2^-E), -(2^(P-1) - 1), 2^(P-1) - 1)

Rounding is to nearest, ties to even. Products of codes are added up in int32, in chains of limited length; the sum of
a chain is converted to float32 and added to a float32 accumulator:

    sum_k a_k b_k  ~  float32 sum over chains of  2^(E_a + E_b) * (int32 sum over the chain of i_a i_b)

A maximum just below a power of two rounds to 2^(P-1), one more than there is; it is clamped (by up to 2^(E-1) beyond
the rounding error of every other element) rather than the exponent raised, which would cost all elements a bit. So no
code is -2^(P-1) and a chain of two full-scale products, at most 2 * 32767^2, still fits int32; three do not.

Legend: P ``bits``, E ``exponent``, 2^E ``scale``.

References:
    Das et al., Mixed Precision Training of Convolutional Neural Networks using Integer Operations, ICLR 2018,
    arXiv:1802.00930. Of this module the paper's abstract states int16 tensors with shared exponents and the int32
    accumulation; the formulas of the scale, of the down-conversion, of the addition and of the chains are from memory,
    re-derived; unverified against the paper's text.
Differs: clamping as above; no wrap-around is modelled, :func:`int32_overflows` counts where it would happen instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.checks import Whole, check
from lightning_eff.functional.codes import TINY, Codes
from lightning_eff.functional.numerics.flexpoint import check_integer_format, integer_codes

_EXPONENT = 0x7F800000  # the exponent field of a float32
INT32 = torch.iinfo(torch.int32)
MAX_CHAIN = 1 << 22
"""Longest chain: its sum of 30-bit products is exact in float64."""


def dfp_scale(max_abs: Tensor, *, bits: int = 16) -> Tensor:
    """Return 2^E, what one unit of the codes is worth.

    Args:
        max_abs: largest magnitude, any shape.
        bits: P, 4..16.

    Returns:
        float32 like ``max_abs``: a power of two, at least 2^-126 (also for zero), NaN where the maximum is not finite.

    Raises:
        ConfigurationError: ``bits`` is not allowed.

    Example:
        >>> dfp_scale(torch.tensor([1.0, 1.9, 2.0])).log2().tolist()
        [-14.0, -14.0, -13.0]
    """
    check_integer_format(bits)
    max_abs = max_abs.to(torch.float32)
    power = (max_abs.contiguous().view(torch.int32) & _EXPONENT).view(torch.float32)  # 2^floor(log2 max|x|), exactly
    return torch.where(max_abs.isfinite(), (power * 2.0 ** (2 - bits)).clamp(min=TINY), torch.nan)


def dfp_codes(x: Tensor, *, bits: int = 16) -> Codes:
    """Quantise to integers with the exponent of the tensor's own maximum.

    The largest code is in 2^(P-2) .. 2^(P-1) - 1 (below it for maxima under 2^(P-128)). The error is absolute, the same
    for all elements: one outlier costs every element bits.

    Args:
        x: any floating tensor; the arithmetic is float32.
        bits: P; 15 and 14 leave room for chains 2 and 4 times as long per operand.

    Returns:
        int16 codes of the shape of ``x``, at most 2^(P-1) - 1 in magnitude, and 2^E; all zero and NaN when ``x`` holds
        NaN or Inf.

    Raises:
        ConfigurationError: ``bits`` is not allowed.

    Example:
        >>> codes, scale = dfp_codes(torch.tensor([1.0, -0.5, 0.3, 1.9, 1e-3, 6.2e-5, 0.0]))
        >>> codes.tolist(), scale.log2().item()
        ([16384, -8192, 4915, 31130, 16, 1, 0], -14.0)
    """
    x = x.detach().to(torch.float32)
    max_abs = x.abs().max() if x.numel() else x.new_zeros(())
    return integer_codes(x, dfp_scale(max_abs, bits=bits), bits=bits, symmetric=True)


def dfp_quantize(x: Tensor, *, bits: int = 16) -> Tensor:
    """Quantise and dequantise: the values of :func:`dfp_codes`, in the dtype of ``x``; all NaN for a broken tensor.

    Args:
        x: any floating tensor.
        bits: see :func:`dfp_codes`.
    """
    return dfp_codes(x, bits=bits).dequantize(x.dtype)


def dfp_downconvert(accumulated: Tensor, exponent: int) -> tuple[Tensor, int]:
    """Shift wide integers right until they fit 16 bits.

        R = max(0, bitlen(max|acc|) - 15),   i = (acc + 2^(R-1)) >> R

    Halves round up. Needs the maximum on the host.

    Args:
        accumulated: int32 or int64, any shape.
        exponent: of ``accumulated``.

    Returns:
        int16 codes, clamped to ±32767 (a maximum of 32767.5 units and more would round to 32768), and their exponent.

    Example:
        >>> dfp_downconvert(torch.tensor([70000, -5], dtype=torch.int32), 0)
        (tensor([17500,    -1], dtype=torch.int16), 2)
    """
    wide = accumulated.to(torch.int64)
    largest = max(abs(int(wide.max())), abs(int(wide.min()))) if wide.numel() else 0
    shift = max(0, largest.bit_length() - 15)
    if shift:
        wide = (wide >> shift) + ((wide >> (shift - 1)) & 1)  # (wide + 2^(R-1)) >> R without the carry out of int64
    return wide.clamp(-32767, 32767).to(torch.int16), exponent + shift


def dfp_add(codes_a: Tensor, exponent_a: int, codes_b: Tensor, exponent_b: int) -> tuple[Tensor, int]:
    """Add two tensors of integers: ``i_a + (i_b >> (E_a - E_b))`` for ``E_a >= E_b``.

    What is shifted out is lost towards minus infinity. A sum of 17 bits is shifted right by the one bit of the carry,
    a sum that fits keeps all of its bits.

    Args:
        codes_a: int16.
        exponent_a: of ``codes_a``.
        codes_b: int16, shape that broadcasts with ``codes_a``.
        exponent_b: of ``codes_b``.

    Returns:
        int16 codes and their exponent, the larger one or one more.

    Example:
        >>> dfp_add(torch.tensor([3], dtype=torch.int16), 0, torch.tensor([9], dtype=torch.int16), -2)
        (tensor([5], dtype=torch.int16), 0)
    """
    if exponent_a < exponent_b:
        codes_a, exponent_a, codes_b, exponent_b = codes_b, exponent_b, codes_a, exponent_a
    aligned = codes_b.to(torch.int32) >> min(exponent_a - exponent_b, 31)  # a shift by the width is undefined
    return dfp_downconvert(codes_a.to(torch.int32) + aligned, exponent_a)


def _check_chain(chain: int) -> None:
    chain = check("chain", chain, Whole(1, MAX_CHAIN))


def int32_overflows(a: Tensor, b: Tensor, *, chain: int) -> int:
    """Count the partial sums of a product that int32 could not hold.

    A partial sum is that of a chain so far, after every single product; chains start anew every ``chain`` products.
    Overflow is a rare event that no average shows: this detector is the only thing that does. It costs one pass over
    the (M, N) result per k.

    Args:
        a: integer codes (M, K).
        b: integer codes (K, N).
        chain: products per chain, 1..4194304.

    Returns:
        0 .. M * K * N.

    Raises:
        ConfigurationError: ``chain`` is not allowed.

    Example:
        >>> full = torch.full((1, 3), 32767)
        >>> int32_overflows(full, full.t(), chain=2), int32_overflows(full, full.t(), chain=3)
        (0, 1)
    """
    _check_chain(chain)
    a, b = a.to(torch.int64), b.to(torch.int64)
    count = torch.zeros((), dtype=torch.int64, device=a.device)
    partial = a.new_zeros(a.shape[0], b.shape[1])
    for k in range(a.shape[1]):
        if k % chain == 0:
            partial.zero_()
        partial.addcmul_(a[:, k, None], b[None, k, :])
        count += ((partial > INT32.max) | (partial < INT32.min)).sum()
    return int(count)


def dfp_product(a: Codes, b: Codes, *, chain: int) -> Tensor:
    """Multiply matrices of codes with exact integer sums per chain and a float32 sum over the chains.

    The reference for faster products; sums that int32 could not hold are exact here, see :func:`int32_overflows`.

    Args:
        a: codes (M, K).
        b: codes (K, N).
        chain: products per chain, 1..4194304.

    Returns:
        float32 (M, N); all NaN when a scale is.

    Raises:
        ConfigurationError: ``chain`` is not allowed.
    """
    _check_chain(chain)
    # The integers are exact in float64, which has fast products on every device. int64 has none on most.
    left, right = a.codes.to(torch.float64), b.codes.to(torch.float64)
    scale = a.scale.to(torch.float64) * b.scale.to(torch.float64)  # could underflow in float32
    total = torch.zeros(left.shape[0], right.shape[1], dtype=torch.float32, device=left.device)
    for begin in range(0, left.shape[1], chain):
        total += (left[:, begin : begin + chain] @ right[begin : begin + chain] * scale).to(torch.float32)
    return total
