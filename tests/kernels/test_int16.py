"""int16 products against exact ones: no overflow for any input, chains as documented, the same bits in every way."""

from __future__ import annotations

import ctypes
import itertools
import math
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from lightning_eff.errors import ConfigurationError
from lightning_eff.kernels import build
from lightning_eff.kernels.build import library
from lightning_eff.kernels.compiler import FLAGS, find_compiler, openmp_of_torch
from lightning_eff.kernels.int16 import int16_native, int16_product

ROWS, COLUMNS, SLICE, BLOCK = 6, 32, 512, 4
"""The kernel's tile, the longest slice of K with one float32 total, and the terms per norm."""
SHAPES = [
    (1, 1, 1),
    (1, 2, 1),
    (7, 3, 33),
    (1, 15, 40),
    (6, 17, 32),
    (13, 33, 1),
    (5, 64, 3),
    (97, 257, 65),
    (31, 700, 90),
]


def uniform(*shape: int) -> Tensor:
    return torch.randint(-32768, 32768, shape, dtype=torch.int16)


def normal(*shape: int) -> Tensor:
    """Normally distributed codes that fill int16, as a quantised tensor does."""
    x = torch.randn(shape)
    return (x / x.abs().amax().clamp(min=1) * 32767).round().to(torch.int16)


def small(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int16)


def constant(value: int) -> Callable[..., Tensor]:
    return lambda *shape: torch.full(shape, value, dtype=torch.int16)


def alternating(*shape: int) -> Tensor:
    return (
        torch.tensor([-32768, 32767], dtype=torch.int16)
        .repeat(math.prod(shape) // 2 + 1)[: math.prod(shape)]
        .view(shape)
    )


def outlier(*shape: int) -> Tensor:
    x = small(*shape)
    x[shape[0] // 2] = -32768
    return x


FULL = [uniform, normal, constant(32767), constant(-32768), constant(-32767), alternating, outlier]
kernels_only = pytest.mark.skipif(library() is None, reason="no compiled kernels here")


@pytest.fixture(params=["kernels", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr("lightning_eff.kernels.operands.library", lambda: None)
    elif library() is None:
        pytest.skip("no compiled kernels here")
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def layouts(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Both operands with either dimension contiguous, as parts of larger tensors, and with neither contiguous."""
    turned_a, turned_b = a.t().contiguous().t(), b.t().contiguous().t()
    part_a, part_b = (torch.nn.functional.pad(x, (3, 5))[:, 3 : 3 + x.shape[1]] for x in (a, b))
    spread_a, spread_b = (x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2] for x in (a, b))
    return [(a, turned_b), (turned_a, b), (turned_a, turned_b), (part_a, part_b), (spread_a, spread_b)]


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """In float64, where integers below 2^53 are exact: 2^23 products of any codes."""
    return a.double() @ b.double()


def norms(x: Tensor) -> Tensor:
    """(rows, terms) -> (blocks,): the largest norm of a block among the rows, rounded up."""
    squares = torch.nn.functional.pad(x.to(torch.int64), (0, -x.shape[1] % BLOCK)).square()
    largest = squares.view(len(x), -1, BLOCK).sum(2).amax(0)
    return torch.tensor([math.isqrt(int(s) - 1) + 1 if s else 0 for s in largest])


def chains(u: Tensor, v: Tensor) -> list[tuple[int, int]]:
    """Where each chain of a slice begins and ends."""
    ends, bound = [], 0
    for i, reach in enumerate((u * v).tolist()):
        bound += reach
        if bound > 2**31 - 1:
            ends.append(i * BLOCK)
            bound = reach
            if reach > 2**31 - 1:
                ends.append(i * BLOCK + 2)
                bound = 2**31 - 1
    ends = sorted({0, *ends, len(u) * BLOCK})
    return list(itertools.pairwise(ends))


def documented_product(a: Tensor, b: Tensor) -> tuple[Tensor, list[int]]:
    """What the kernel documents, tile by tile: the result, and the length of every chain."""
    (m, k), n = a.shape, b.shape[1]
    depth = math.ceil(k / math.ceil(k / SLICE) / 32) * 32
    out, lengths = torch.zeros(m, n), []
    for p in range(0, k, depth):
        for i in range(0, m, ROWS):
            for j in range(0, n, COLUMNS):
                left, right = a[i : i + ROWS, p : p + depth], b[p : p + depth, j : j + COLUMNS]
                total = torch.zeros(len(left), right.shape[1])
                for begin, end in chains(norms(left), norms(right.t())):
                    exact = exact_product(left[:, begin:end], right[begin:end])
                    assert exact.abs().max() <= 2**31 - (end - begin > 2)
                    total += exact.to(torch.float32)
                    lengths.append(end - begin)
                out[i : i + ROWS, j : j + COLUMNS] += total
    return out, lengths


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_sums_below_2_24_are_exact(m: int, k: int, n: int, path: str) -> None:
    """Any order and any chains add these up without rounding: sums of magnitudes stay below 2^24."""
    a, b = small(m, k), small(k, n)
    expected = exact_product(a, b)
    for left, right in [(a, b), *layouts(a, b)]:
        assert torch.equal(int16_product(left, right).double(), expected)


@pytest.mark.parametrize("right", FULL)
@pytest.mark.parametrize("left", FULL)
def test_error_is_that_of_float32_additions(
    left: Callable[..., Tensor], right: Callable[..., Tensor], path: str
) -> None:
    for m, k, n in SHAPES:
        a, b = left(m, k), right(k, n)
        error = (int16_product(a, b).double() - exact_product(a, b)).abs()
        size = exact_product(a.int().abs(), b.int().abs())
        assert (error <= (k / 2 + k / SLICE + 4) * 2.0**-24 * size).all()


@kernels_only
@pytest.mark.parametrize("kind", [*FULL, small])
def test_chains_are_those_documented(kind: Callable[..., Tensor]) -> None:
    for m, k, n in [*SHAPES, (4, 1100, 5)]:
        a, b = kind(m, k), kind(k, n)
        assert torch.equal(int16_product(a, b), documented_product(a, b)[0])
        if m > 1:  # one operand with small codes: chains in between
            b = small(k, n)
            assert torch.equal(int16_product(a, b), documented_product(a, b)[0])


def test_chain_lengths() -> None:
    """As long as the module says, and two terms at full scale."""
    assert documented_product(constant(2047)(6, 512), constant(2047)(512, 32))[1] == [512]
    assert set(documented_product(constant(-32768)(6, 512), constant(32767)(512, 32))[1]) == {2}
    lengths = documented_product(normal(96, 1024), normal(1024, 96))[1]
    assert 10 <= sum(lengths) / len(lengths) <= 20


@kernels_only
@given(
    m=st.integers(1, 40),
    k=st.integers(1, 90),
    n=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    largest=st.integers(1, 32768),
)
def test_any_product(m: int, k: int, n: int, seed: int, largest: int) -> None:
    torch.manual_seed(seed)
    a, b = torch.randint(-largest, largest, (m, k), dtype=torch.int16), uniform(k, n)
    assert torch.equal(int16_product(a, b), documented_product(a, b)[0])


@kernels_only
@pytest.mark.parametrize("kind", [uniform, normal])
def test_the_same_bits_for_every_layout_and_number_of_threads(
    kind: Callable[..., Tensor], threads: Callable[[int], None]
) -> None:
    for m, k, n in [(1, 17, 1), (97, 257, 65), (130, 1100, 70), (400, 40, 300), (13, 33, 2500)]:
        a, b = kind(m, k), kind(k, n)
        threads(1)
        expected = int16_product(a, b)
        for count in (1, 2, 3):
            threads(count)
            for left, right in [(a, b), *layouts(a, b)]:
                assert torch.equal(int16_product(left, right), expected)
        assert torch.equal(int16_product(a[:60], b), expected[:60])  # whole tiles do not depend on what surrounds them
        assert torch.equal(int16_product(a, b[:, :64]), expected[:, :64])


@kernels_only
def test_the_same_bits_without_vnni(tmp_path: Path) -> None:
    """What other processors compile, compiled here."""
    compiler, target = find_compiler().command, tmp_path / "portable.so"
    if not compiler or not int16_native():
        pytest.skip("nothing to compare")
    source = Path(build.__file__).parent / "src" / "int16_product.cpp"
    flags = [*FLAGS, "-Wall", "-Wextra", "-Werror", "-U__AVX512VNNI__"]
    subprocess.run([*compiler, *flags, str(source), "-o", str(target), *openmp_of_torch()], check=True)
    portable, native = ctypes.CDLL(str(target)), ctypes.c_int32(-1)
    portable.eff_int16_native(ctypes.byref(native))
    assert native.value == 0
    portable.eff_int16_product.argtypes = build.SIGNATURES["eff_int16_product"]
    for kind in (uniform, normal, alternating):
        for m, k, n in [*SHAPES, (130, 600, 70)]:
            a, b = kind(m, k), kind(k, n)
            for left, right in ((a, b), *layouts(a, b)[:3]):
                found = torch.full((m, n), torch.nan)
                portable.eff_int16_product(
                    left.data_ptr(), *left.stride(), right.data_ptr(), *right.stride(), m, n, k, found.data_ptr(), 2
                )
                assert torch.equal(found, int16_product(a, b))


@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 3), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_empty(m: int, k: int, n: int, path: str) -> None:
    assert torch.equal(int16_product(uniform(m, k), uniform(k, n)), torch.zeros(m, n))


def test_out_is_written_and_returned(path: str) -> None:
    for m, k, n in [(50, 700, 40), (3, 0, 4)]:
        a, b, out = uniform(m, k), uniform(k, n), torch.full((m, n), torch.nan)
        assert int16_product(a, b, out=out) is out
        assert torch.equal(out, int16_product(a, b))


def test_autocast_leaves_the_emulation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_eff.kernels.operands.library", lambda: None)
    a, b = normal(9, 50), normal(50, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(int16_product(a, b), exact_product(a, b).to(torch.float32))


def test_native_means_compiled_for_vnni(path: str) -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert int16_native() == (path == "kernels" and "avx512_vnni" in flags and "avx512bw" in flags)


@pytest.mark.parametrize(
    ("a", "b", "out", "message"),
    [
        (small(2, 3), small(4, 2), None, "takes \\(M, K\\)"),
        (small(2, 3).int(), small(3, 2), None, "int32"),
        (small(2, 3), small(3), None, "takes \\(M, K\\)"),
        (small(2, 3), small(3, 2).to("meta"), None, "one device"),
        (small(2, 3), small(3, 2), torch.empty(3, 2), "out must be"),
        (small(2, 3), small(3, 2), torch.empty(2, 2).double(), "float64"),
        (small(2, 3), small(3, 2), torch.empty(2, 4)[:, ::2], "strides"),
    ],
)
def test_wrong_operands_are_refused(a: Tensor, b: Tensor, out: Tensor | None, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        int16_product(a, b, out=out)
