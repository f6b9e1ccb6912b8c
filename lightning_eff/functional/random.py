"""Cheap reproducible random bits: one seed per tensor, a hash of the element's position per element.

Element ``i`` in row ``r = i // 2048``, column ``j = i % 2048`` gets ``mix(j * 0x9E3779B9 + row_seed(seed, r))`` with a
32-bit mixing function that is a bijection (C. Wellons, "lowbias32"). The bits depend on the seed and the position
alone, so every implementation (torch here, C++ in ``kernels``) gives the same rounding at any number of threads, and
drawing one 64-bit seed costs nothing beside drawing a number per element.

Seeds are told apart by :func:`mix64`, the finaliser of splitmix64: ``mix64(seed + k * GOLDEN64)`` for k = 1, 2, .. is
that generator's sequence.

References:
    Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014 (splitmix64; constants as in
    Vigna's public-domain code).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

ROW = 2048
_GOLDEN = 0x9E3779B9
_MASK = 0xFFFFFFFF
MASK64 = (1 << 64) - 1
"""Seeds are 64 bits."""
GOLDEN64 = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, odd: its multiples are spread evenly over the 64-bit integers."""


def _signed(value: int) -> int:
    """The int32 with the same 32 bits as ``value``."""
    value &= _MASK
    return value - (1 << 32) if value >= 1 << 31 else value


def mix32(h: Tensor) -> Tensor:
    """Mix int32 ``h`` so that every input bit moves about half of the output bits (lowbias32)."""
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * _signed(0x7FEB352D)
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * _signed(0x846CA68B)
    return h ^ ((h >> 16) & 0xFFFF)


def mix64(z: int) -> int:
    """Mix the 64 low bits of ``z`` so that every one moves about half of the result's, a bijection (splitmix64).

    Example:
        >>> hex(mix64(GOLDEN64))  # the first number of the generator with seed 0
        '0xe220a8397b1dcdaf'
    """
    z &= MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def uniform_bits(numel: int, seed: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return 32 uniform bits for each of ``numel`` elements, a function of ``seed`` and position alone.

    Args:
        numel: number of elements.
        seed: 64-bit integer, from :func:`draw_seed` or a counter.
        device: where the result lies; default: the CPU.

    Returns:
        int32 of shape ``(numel,)``.
    """
    device = torch.device("cpu" if device is None else device)
    rows = torch.arange((numel + ROW - 1) // ROW, dtype=torch.int32, device=device)
    # The low word is mixed first: a seed and its successor (a counter) must not share the bits of any two rows.
    low = mix32(torch.tensor(_signed(seed), dtype=torch.int32, device=device))
    row_seed = mix32(mix32(rows ^ low) + _signed(seed >> 32))
    column = (torch.arange(ROW, dtype=torch.int64, device=device) * _GOLDEN & _MASK).to(torch.int32)
    return mix32(row_seed[:, None] + column).reshape(-1)[:numel]


def uniform(numel: int, seed: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return uniform float32 in [0, 1) with 23 bits, from :func:`uniform_bits`; shape ``(numel,)``."""
    bits = uniform_bits(numel, seed, device=device)
    return ((bits >> 9) & 0x7FFFFF).to(torch.float32) * 2.0**-23


def draw_seed() -> int:
    """Draw a 64-bit seed from torch's global CPU generator, different on every rank of a process group.

    Ranks seeded alike (``seed_everything``) would otherwise round alike and their errors would not average out.
    """
    return rank_seed(int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")))


def rank_seed(seed: int) -> int:
    """Make ``seed`` differ between ranks; rank 0, and a run without process group, keep it as it is."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return (seed ^ (rank * GOLDEN64)) & MASK64
