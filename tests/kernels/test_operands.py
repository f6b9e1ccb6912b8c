"""The border between Python and C: what is not as a kernel takes it is refused, by name, before anything is touched."""

from __future__ import annotations

import ast
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_eff
from lightning_eff.errors import InternalError
from lightning_eff.functional.codes import Codes
from lightning_eff.kernels import bf16, build, fp8, products, quantize, relu
from lightning_eff.kernels import shared_exponent as shared
from lightning_eff.kernels.operands import FLOATS, buffer, empty, matrix_pointer, memory, pointer, prepared, wrote

PACKAGE = Path(lightning_eff.__file__).parent
F32, HALF = torch.float32, torch.bfloat16


def cut(nbytes: int) -> Tensor:
    """A tensor whose storage was made smaller behind its back, as FSDP frees parameters."""
    x = torch.zeros(4, 8)
    x.untyped_storage().resize_(nbytes)
    return x


WRONG: dict[str, tuple[Callable[[], Tensor], str]] = {
    "dtype": (lambda: torch.zeros(4, 8, dtype=torch.float64), "torch.float64"),
    "half of the bytes": (lambda: torch.zeros(4, 8, dtype=torch.float16), "torch.float16"),
    "device": (lambda: torch.zeros(4, 8, device="meta"), "on meta"),
    "gaps": (lambda: torch.zeros(4, 16)[:, ::2], r"strides \(16, 2\)"),
    "turned": (lambda: torch.zeros(8, 4).t(), r"strides \(1, 4\)"),
    "expanded": (lambda: torch.zeros(1, 8).expand(4, 8), r"strides \(0, 1\)"),
    "too few": (lambda: torch.zeros(31), r"shape \(31,\)"),
    "part of more": (lambda: torch.zeros(100)[:31], r"shape \(31,\)"),
    "freed": (lambda: cut(0), "0 bytes of memory"),
    "cut": (lambda: cut(127), "127 bytes of memory"),
    "sparse": (lambda: torch.zeros(4, 8).to_sparse(), "layout torch.sparse_coo"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_kernel_cannot_take_is_refused_by_name(name: str) -> None:
    make, found = WRONG[name]
    with pytest.raises(InternalError, match=rf"argument eff_test\(x\) is .*{found}.*32 elements.*torch\.float32"):
        pointer("eff_test(x)", make(), 32, *FLOATS)


def test_what_a_kernel_can_take_is_passed_on() -> None:
    whole = torch.zeros(100)
    for x in (whole, whole[10:42], whole[:32].view(4, 8), torch.zeros(4, 8, dtype=HALF)):
        assert pointer("eff_test(x)", x, 32, *FLOATS) == x.data_ptr()
    images = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert pointer("eff_test(x)", images, 120, F32, any_order=True) == images.data_ptr()
    with pytest.raises(InternalError, match="strides"):
        pointer("eff_test(x)", images, 120, F32)
    with pytest.raises(InternalError, match="strides"):
        pointer("eff_test(x)", images[:, :2], 80, F32, any_order=True)
    assert pointer("eff_test(x)", None, 32, F32) is None


def test_matrices_may_have_strides_but_must_lie_in_memory() -> None:
    whole = torch.zeros(6, 10, dtype=torch.int16)
    for x in (whole, whole.t(), whole[1:4, :5], whole[:, 3:].t()):
        assert matrix_pointer("eff_test(a)", x, torch.int16) == x.data_ptr()
    freed = torch.zeros(4, 8, dtype=torch.int16)
    freed.untyped_storage().resize_(62)
    for x in (whole.to(torch.int32), whole[0], freed, whole.to("meta")):
        with pytest.raises(InternalError, match=r"eff_test\(a\).*a matrix, torch.int16"):
            matrix_pointer("eff_test(a)", x, torch.int16)


def test_the_look_costs_less_than_the_shortest_kernel() -> None:
    x = torch.zeros(64, 64)
    best = min(timeit.repeat(lambda: pointer("eff_test(x)", x, 4096, *FLOATS), number=2000, repeat=20)) / 2000
    assert best < 3e-6  # 0.8e-6 on an idle core of 2.6 GHz


CALLS: dict[str, Callable[[], Any]] = {
    "a scale of another dtype": lambda: products.rescale(torch.ones(2, 3), torch.ones((), dtype=HALF), torch.ones(())),
    "sums of another dtype": lambda: products.rescale(
        torch.ones(2, 3, dtype=torch.int64), torch.ones(()), torch.ones(())
    ),
    "too short a bias": lambda: products.rescale(torch.ones(2, 3), torch.ones(()), torch.ones(()), bias=torch.ones(2)),
    "a compensation of another dtype": lambda: bf16.write_kahan(
        torch.ones(9, dtype=HALF), torch.ones(9, dtype=torch.int8), torch.ones(9)
    ),
    "values of another dtype": lambda: bf16.write_split(
        torch.ones(9, dtype=HALF), torch.ones(9, dtype=torch.int16), torch.ones(9, dtype=HALF)
    ),
    "fewer values than weights": lambda: bf16.write_stochastic(torch.ones(9, dtype=HALF), torch.ones(8), 1),
    "a weight of another dtype": lambda: bf16.write_stochastic(torch.ones(9), torch.ones(9), 1),
    "a gradient of another dtype": lambda: bf16.sgd_step(
        bf16.SGDRule(lr=1.0), torch.ones(9, dtype=HALF), None, torch.ones(9), None, update="sr"
    ),
    "bytes that are no codes": lambda: fp8.fp8_decode(torch.ones(9, dtype=torch.uint8)),
    "too few packed codes": lambda: quantize.unpack_int4(torch.ones(4, dtype=torch.uint8), 9),
    "observed in another dtype": lambda: shared.integer_encode(
        torch.ones(9), torch.ones(()), observed=torch.ones((), dtype=HALF)
    ),
    "a mask of another tensor": lambda: relu.apply_mask(torch.ones(90), torch.ones(2, dtype=torch.uint8), (1,)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_is_not_called_with_what_it_was_not_made_for(name: str) -> None:
    if build.library() is None:
        pytest.skip("no compiled kernels here")
    with pytest.raises(InternalError, match=r"the kernel argument eff_\w+\(\w+\) is"):
        CALLS[name]()


def test_inputs_of_any_kind_become_what_kernels_read() -> None:
    z = torch.randn(3, 4, dtype=torch.complex64)
    for x in (z.real, z.conj().imag, torch.randn(4, 3, dtype=torch.float64).t(), torch.randn(9, requires_grad=True)):
        found = prepared(x)
        assert found.dtype in FLOATS
        assert found.is_contiguous()
        assert not found.requires_grad
        assert not found.is_neg()
        assert torch.equal(found, x.detach().clone().float())
    one = torch.randn(1, dtype=torch.complex64).conj().imag  # contiguous, and negated when it is read
    assert one.is_neg()
    assert quantize.sawb_encode(one)[0].dequantize(F32).sign() == one.sign()
    assert fp8.fp8_encode(one, torch.float8_e4m3fn)[0].codes.float().sign() == one.sign()


def test_buffers_memory_and_versions() -> None:
    with torch.device("meta"):
        assert empty((2, 3), HALF).device.type == "cpu"
    out = torch.zeros(10)
    assert buffer(out, (2, 3), 6, F32).data_ptr() == out.data_ptr()
    assert buffer(None, (2, 3), 6, HALF).dtype is HALF
    assert memory(torch.zeros(1, 8).expand(4, 8))[1] == 32
    assert memory(cut(0)) == (0, 0)
    with torch.inference_mode():
        wrote(torch.zeros(1))
    version = out._version
    wrote(out)
    assert out._version == version + 1


def calls() -> list[tuple[Path, ast.Call]]:
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    return [(path, node) for path, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.Call)]


FACTORIES = ["arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace"]
FACTORIES += ["normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "sparse_coo_tensor"]
FACTORIES += ["tensor", "zeros"]


def test_every_tensor_is_created_with_its_dtype_and_device() -> None:
    """Defaults are the user's, and Lightning's: half-precision plugins change them, and so does ``torch.device``."""
    missing = [
        f"{path.relative_to(PACKAGE)}:{call.lineno}: torch.{call.func.attr} without {word}"
        for path, call in calls()
        if isinstance(call.func, ast.Attribute) and call.func.attr in FACTORIES
        if isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
        for word in ("dtype", "device")
        if word not in {keyword.arg for keyword in call.keywords}
    ]
    assert missing == []


def test_no_kernel_module_but_one_asks_for_an_address() -> None:
    asked = {
        path.name
        for path, call in calls()
        if path.parent.name == "kernels" and isinstance(call.func, ast.Attribute) and call.func.attr == "data_ptr"
    }
    assert asked == {"operands.py"}


def test_every_kernel_argument_is_named_after_the_kernel_it_goes_to() -> None:
    """A place that was copied from another call would accuse the wrong one."""
    for path, call in calls():
        if isinstance(call.func, ast.Attribute) and call.func.attr in build.SIGNATURES:
            places = [
                inner.args[0].value
                for inner in ast.walk(call)
                if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and "pointer" in inner.func.id
                if isinstance(inner.args[0], ast.Constant)
            ]
            assert all(str(place).startswith(f"{call.func.attr}(") for place in places), (path, call.lineno)
            assert len(places) == len(set(places))


def test_an_integer_product_of_codes_on_two_devices_is_left_to_torch() -> None:
    a = Codes(torch.ones(2, 3, dtype=torch.int8), torch.ones(()))
    assert products.kernels_for(a.codes, a.codes.to("meta"), None) is None
