"""The compiled bfloat16 write-back against ``functional``: bit for bit, at any size and number of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_eff.functional.numerics import bf16 as functional
from lightning_eff.kernels import bf16

pytestmark = pytest.mark.usefixtures("compiled_kernels")

SIZES = (0, 1, 63, 2047, 2048, 2049, 32767, 32769, 100_003)  # rows of 2048, threads from 32768


def patterns(size: int) -> Tensor:
    """Random bits: every kind of number there is, NaN and Inf as well."""
    x = torch.randint(-(2**31), 2**31, (size,)).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-40])
    x[: special.numel()] = special[:size]
    return x


def same(a: Tensor, b: Tensor) -> bool:
    whole = torch.int32 if a.dtype is torch.float32 else torch.int16
    return torch.equal(a.view(whole), b.view(whole))


@pytest.mark.parametrize("size", SIZES)
def test_stochastic_rounding(size: int, threads: int, seed: int) -> None:
    x, weight = patterns(size), torch.empty(size, dtype=torch.bfloat16)
    for number in (seed, -1, 2**64 - 3):
        bf16.write_stochastic(weight, x, number)
        assert same(weight, functional.bf16_stochastic_round(x, number))


@pytest.mark.parametrize("size", SIZES)
def test_split_and_join(size: int, threads: int, seed: int) -> None:
    x, weight, lo = patterns(size), torch.empty(size, dtype=torch.bfloat16), torch.empty(size, dtype=torch.int16)
    bf16.write_split(weight, lo, x)
    hi, lower = functional.split_fp32(x)
    assert same(weight, hi)
    assert torch.equal(lo, lower)
    assert same(bf16.join_fp32(weight, lo), functional.join_fp32(hi, lower))


def test_join_of_any_two_halves(seed: int) -> None:
    hi = torch.randint(-(2**15), 2**15, (50_000,), dtype=torch.int16).view(torch.bfloat16)
    lo = torch.randint(-(2**15), 2**15, (50_000,), dtype=torch.int16)
    assert same(bf16.join_fp32(hi, lo), functional.join_fp32(hi, lo))


@pytest.mark.parametrize("size", SIZES)
def test_kahan(size: int, threads: int, seed: int) -> None:
    for update in (patterns(size), torch.randn(size) * 1e-3):
        weight = torch.randn(size).to(torch.bfloat16)
        rest = (torch.randn(size) * 1e-3).to(torch.bfloat16)
        new, new_rest = functional.kahan_step(weight, rest, update)
        bf16.write_kahan(weight, rest, update)
        assert bool((weight.view(torch.int16) == new.view(torch.int16)).logical_or(weight.isnan() & new.isnan()).all())
        assert same(rest, new_rest)


def test_kahan_of_a_sum_adds_the_difference(seed: int) -> None:
    total = torch.cat([patterns(3000), torch.randn(3000)])
    weight, rest = torch.randn(6000).to(torch.bfloat16), torch.zeros(6000, dtype=torch.bfloat16)
    expected, expected_rest = functional.kahan_step(weight, rest, total - weight)
    bf16.write_kahan(weight, rest, total, is_sum=True)
    assert torch.equal(weight.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert same(rest, expected_rest)


RULES = {
    "plain": bf16.SGDRule(lr=0.3),
    "momentum": bf16.SGDRule(lr=0.3, momentum=0.9),
    "nesterov": bf16.SGDRule(lr=0.3, momentum=0.9, nesterov=True),
    "decay": bf16.SGDRule(lr=0.3, weight_decay=0.1, maximize=True),
    "everything": bf16.SGDRule(lr=-1e-3, momentum=0.7, dampening=0.3, weight_decay=0.01, maximize=True),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("update", ["sr", "kahan", "split"])
@pytest.mark.parametrize("size", [0, 1, 2049, 40_000])
def test_sgd_in_one_pass_is_sgd_in_four(size: int, update: Any, rule: bf16.SGDRule, threads: int, seed: int) -> None:
    weight, lo = functional.split_fp32(torch.randn(size))
    other, rest = weight.clone(), (torch.randn(size) / 256).to(torch.bfloat16)
    kept = {"sr": None, "kahan": rest.clone(), "split": lo.clone()}[update]
    buffer = torch.full((size,), torch.nan) if rule.momentum else None
    expected = None if buffer is None else buffer.clone()
    for turn in range(3):
        grad = torch.randn(size).to(torch.bfloat16)
        value = functional.join_fp32(other, lo) if update == "split" else other.float()
        rule(value, grad.float(), expected, first=turn == 0)
        if update == "sr":
            other = functional.bf16_stochastic_round(value, turn)
        elif update == "kahan":
            other, rest = functional.kahan_step(other, rest, value - other)
        else:
            other, lo = functional.split_fp32(value)
        assert bf16.sgd_step(rule, weight, kept, grad, buffer, update=update, first=turn == 0, seed=turn)
        assert same(weight, other)
        assert buffer is None or torch.equal(buffer, expected)
        assert kept is None or torch.equal(kept, {"kahan": rest, "split": lo}[update])


def test_sgd_keeps_nan_and_inf(seed: int) -> None:
    weight, lo = functional.split_fp32(patterns(4000))
    value, grad = functional.join_fp32(weight, lo), torch.randn(4000).to(torch.bfloat16)
    RULES["decay"](value, grad.float(), None, first=False)
    assert bf16.sgd_step(RULES["decay"], weight, lo, grad, None, update="split")
    assert torch.equal(functional.join_fp32(weight, lo).nan_to_num(7.0), value.nan_to_num(7.0))


def test_sgd_is_left_to_torch_where_it_rounds_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, lo = functional.split_fp32(torch.randn(8))
    arguments: Any = (bf16.SGDRule(lr=0.1), weight, lo, torch.ones(8, dtype=torch.bfloat16), None)
    before = weight.clone()
    bf16.rounds_like_torch.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(bf16.SGDRule, "__call__", lambda self, value, *_, **__: value.add_(1e-7))
        assert not bf16.sgd_step(*arguments, update="split")
    assert torch.equal(weight, before)
    bf16.rounds_like_torch.cache_clear()
    assert bf16.sgd_step(*arguments, update="split")
    assert not torch.equal(weight, before)


def test_a_strided_weight_is_written_in_its_own_order(seed: int) -> None:
    x = torch.randn(2, 8, 5, 6)
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = torch.empty(2, 8, 5, 6, dtype=torch.bfloat16, memory_format=layout)
        bf16.write_stochastic(weight, x, 3)
        assert torch.equal(weight, functional.bf16_stochastic_round(x, 3))
        lo = torch.zeros(2, 8, 5, 6, dtype=torch.int16)
        bf16.write_split(weight, lo, x)
        assert torch.equal(bf16.join_fp32(weight, lo), x)
        bf16.write_kahan(weight, torch.zeros_like(weight), torch.ones_like(x))
        transposed = weight.transpose(0, 1)
        assert not bf16.sgd_step(RULES["plain"], transposed, None, transposed.clone(), None, update="sr")


def test_the_version_counter_moves() -> None:
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    before = weight._version
    bf16.write_stochastic(weight, torch.ones(4), 1)
    bf16.write_kahan(weight, torch.zeros(4, dtype=torch.bfloat16), torch.ones(4))
    bf16.write_split(weight, torch.zeros(4, dtype=torch.int16), torch.ones(4))
    assert bf16.sgd_step(RULES["plain"], weight, None, torch.ones(4, dtype=torch.bfloat16), None, update="sr")
    assert weight._version == before + 4
