"""Packing, exhaustively, and the meaning of codes and scale."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lightning_eff.functional import Codes, pack_int4, saturated_share, sqnr_db, unpack_int4, zero_share


@pytest.mark.parametrize(("unsigned", "codes"), [(False, range(-8, 8)), (True, range(16))])
def test_every_pair_of_codes(unsigned: bool, codes: range) -> None:
    pairs = torch.tensor(list(itertools.product(codes, codes)), dtype=torch.int8)
    packed = pack_int4(pairs)
    assert packed.shape == (256,)
    assert packed.dtype == torch.uint8
    assert packed.unique().numel() == 256
    assert torch.equal(unpack_int4(packed, pairs.numel(), unsigned=unsigned), pairs.view(-1))


def test_low_nibble_first() -> None:
    assert pack_int4(torch.tensor([1, -1, 7], dtype=torch.int8)).tolist() == [0xF1, 0x07]


@given(shape=st.lists(st.integers(0, 9), max_size=4), unsigned=st.booleans(), seed=st.integers(0, 10**6))
def test_any_shape_round_trips(shape: list[int], unsigned: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = (0, 16) if unsigned else (-8, 8)
    codes = torch.randint(low, high, shape, generator=generator, dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.shape == ((codes.numel() + 1) // 2,)
    assert torch.equal(unpack_int4(packed, codes.numel(), unsigned=unsigned).view(shape), codes)
    if codes.dim() >= 2:
        turned = codes.transpose(0, 1)  # read in row-major order of the view, not of the memory
        assert torch.equal(unpack_int4(pack_int4(turned), codes.numel(), unsigned=unsigned), turned.reshape(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dequantize(dtype: torch.dtype) -> None:
    value = Codes(torch.tensor([-7, 0, 3], dtype=torch.int8), torch.tensor(0.25)).dequantize(dtype)
    assert value.dtype == dtype
    assert value.tolist() == [-1.75, 0.0, 0.75]
    assert Codes(torch.zeros(2, dtype=torch.int8), torch.tensor(torch.nan)).dequantize(dtype).isnan().all()


def test_sqnr() -> None:
    x = torch.tensor([3.0, 4.0])
    assert sqnr_db(x, torch.tensor([3.0, 4.5])).item() == pytest.approx(20.0)  # 25 / 0.25
    assert sqnr_db(x, x).item() == torch.inf
    assert sqnr_db(x.to(torch.bfloat16), torch.tensor([3.0, 4.5])).item() == pytest.approx(20.0)


def test_shares() -> None:
    codes = torch.tensor([0, 64, -64, 1, 0, 2, 0, -1], dtype=torch.int8)
    assert zero_share(codes).item() == 3 / 8
    assert saturated_share(codes, 64).item() == 2 / 8
