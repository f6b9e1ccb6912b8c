"""The sampled hash that tells whether a tensor was written to behind autograd's back; both versions of it."""

from __future__ import annotations

import pytest
import torch

from lightning_eff.kernels import quantize


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def _version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr("lightning_eff.kernels.operands.library", lambda: None)


def test_fingerprint_sees_an_overwritten_tensor() -> None:
    x = torch.randn(100, 100)
    before = quantize.fingerprint(x)
    assert quantize.fingerprint(x.clone()) == before
    assert quantize.fingerprint(x * 1.0001) != before
    assert quantize.fingerprint(x.to(torch.bfloat16)) != quantize.fingerprint(x.to(torch.bfloat16) * 2)
    for size in (0, 1, 2, 63, 65):
        small = torch.randn(size)
        assert size == 0 or quantize.fingerprint(small) != quantize.fingerprint(small + 1)


def test_fingerprint_stays_inside_the_memory_of_a_view() -> None:
    row = torch.randn(1, 64)
    before = quantize.fingerprint(row.expand(1_000_000, 64))  # reading a million rows would end the process
    row += 1
    assert quantize.fingerprint(row.expand(1_000_000, 64)) != before
    assert quantize.fingerprint(row[:, 63:].expand(1_000_000, 1)) == quantize.fingerprint(row[:, 63:])
