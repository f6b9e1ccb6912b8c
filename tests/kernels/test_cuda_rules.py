"""What CUDA's int8 product asks of its operands: more than 16 rows, inner and outer size multiples of 8."""

from __future__ import annotations

import pytest
import torch

from lightning_eff.kernels.products import padded


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (16, 8, 8), (17, 7, 9), (40, 24, 16), (3, 100, 5)], ids=str)
def test_padding_meets_the_rules_and_changes_no_sum(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-64, 65, (m, k), generator=generator).to(torch.int8)
    b = torch.randint(-64, 65, (n, k), generator=generator).to(torch.int8).t()
    left, right = padded(a, b)
    assert left.shape[0] > 16
    assert left.shape[1] % 8 == right.shape[0] % 8 == right.shape[1] % 8 == 0
    assert left.is_contiguous()
    assert left.dtype == right.dtype == torch.int8
    assert torch.equal((left.double() @ right.double())[:m, :n], a.double() @ b.double())
