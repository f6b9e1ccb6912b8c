"""What all kernel modules share: element types, inputs as kernels read them, and the border every pointer passes.

C believes what it is told. A tensor of another dtype than the kernel was written for, on another device, with gaps
between its elements or with fewer of them is read or written past its end, and the process dies or, worse, lives on.
Such tensors come from nowhere near: ``torch.empty`` without a dtype is bfloat16 inside Lightning's forward context, and
on the meta device inside ``with torch.device("meta")``. Hence two rules, each held up by a test:

* every tensor of this package is created with its dtype and its device;
* no module but this one asks a tensor for its address. :func:`pointer` looks at the tensor first, always.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_eff.errors import InternalError
from lightning_eff.kernels.build import library

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Element types that kernels read and write, by the number that tells them which."""
FLOATS = tuple(TYPES)
FP8_FORMATS = {torch.float8_e4m3fn: 0, torch.float8_e5m2: 1}
"""Formats of FP8 codes, by the number that tells kernels which."""
CPU = torch.device("cpu")


def kernels_for(*tensors: Tensor | None) -> ctypes.CDLL | None:
    """Return the compiled kernels, if there are any and all ``tensors`` (but those that are None) lie on the CPU."""
    for x in tensors:  # a loop costs half of all()
        if x is not None and not x.is_cpu:
            return None
    return library()


def prepared(x: Tensor) -> Tensor:
    """Return ``x`` as kernels read it: without history, float32 or bfloat16, its elements in order, without gaps."""
    x = x.detach()
    if x.is_neg():  # a view that negates when it is read, part of the conjugate of a complex tensor
        x = x.resolve_neg()
    return (x if x.dtype in TYPES else x.to(torch.float32)).contiguous()


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor for kernels to write to, whatever the default dtype and the default device are."""
    return torch.empty(shape, dtype=dtype, device=CPU)


def buffer(out: Tensor | None, shape: tuple[int, ...] | torch.Size, numel: int, dtype: torch.dtype) -> Tensor:
    """Return the first ``numel`` elements of ``out``, or of a new tensor, as a tensor of ``shape``."""
    return empty(shape, dtype) if out is None else out[:numel].view(shape)


def threads() -> int:
    """Return how many threads a kernel may use: as many as torch does."""
    return torch.get_num_threads()


def wrote(x: Tensor) -> None:
    """Tell autograd that a kernel has written to ``x``; inference tensors keep no count."""
    if not x.is_inference():
        increment_version(x)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Let products of codes be made in the dtypes of the codes."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------------------- the border


@overload
def pointer(place: str, x: None, numel: int, *dtypes: torch.dtype, any_order: bool = False) -> None: ...
@overload
def pointer(place: str, x: Tensor, numel: int, *dtypes: torch.dtype, any_order: bool = False) -> int: ...
@overload
def pointer(place: str, x: Tensor | None, numel: int, *dtypes: torch.dtype, any_order: bool = False) -> int | None: ...
def pointer(place: str, x: Tensor | None, numel: int, *dtypes: torch.dtype, any_order: bool = False) -> int | None:
    """Return the address of ``x`` for a kernel, or a null pointer for None, after a look at what lies there.

    Less than a microsecond: the shortest kernel takes several.

    Args:
        place: kernel and argument, for the error.
        x: the tensor.
        numel: elements the kernel reads or writes.
        dtypes: those it may have.
        any_order: the kernel treats every element by itself, so that any order of axes will do.

    Raises:
        InternalError: the kernel would read or write something else than the elements of ``x``.
    """
    if x is None:
        return None
    if (
        x.is_cpu
        and x.dtype in dtypes
        and (x.is_contiguous() or (any_order and is_dense(x)))
        and x.numel() >= numel
        and (x.storage_offset() + numel) * x.itemsize <= x.untyped_storage().nbytes()  # it may have been freed (FSDP)
    ):
        return x.data_ptr()
    raise _refused(place, x, f"a contiguous tensor of {numel} elements or more", dtypes)


def matrix_pointer(place: str, x: Tensor, dtype: torch.dtype) -> int:
    """Return the address of a matrix with any strides, for a kernel that is told them; see :func:`pointer`.

    Raises:
        InternalError: the kernel would read something else than the elements of ``x``.
    """
    if x.is_cpu and x.dtype is dtype and x.dim() == 2:
        rows, columns = x.stride()
        last = x.storage_offset() + (x.shape[0] - 1) * rows + (x.shape[1] - 1) * columns
        if (last + 1) * x.itemsize <= x.untyped_storage().nbytes():
            return x.data_ptr()
    raise _refused(place, x, "a matrix", (dtype,))


def memory(x: Tensor) -> tuple[int, int]:
    """Return address and bytes of the memory of a CPU tensor of any dtype; no more than there is (expanded, freed)."""
    there = x.untyped_storage().nbytes() - x.storage_offset() * x.itemsize
    size = max(int(min(x.numel() * x.itemsize, there)), 0)
    return (x.data_ptr() if size else 0), size


def is_dense(x: Tensor) -> bool:
    """Return whether the elements fill one piece of memory, in any order of axes."""
    if x.is_contiguous():
        return True
    strides = x.stride()
    return x.permute(sorted(range(x.dim()), key=lambda d: -strides[d])).is_contiguous()


def _refused(place: str, x: Tensor, wanted: str, dtypes: tuple[torch.dtype, ...]) -> InternalError:
    kinds = " or ".join(map(str, dtypes))
    strides = f"strides {x.stride()}" if x.layout is torch.strided else f"layout {x.layout}"
    held = f", {x.untyped_storage().nbytes()} bytes of memory" if x.is_cpu and x.layout is torch.strided else ""
    return InternalError(
        f"internal error: the kernel argument {place} is {x.dtype} of shape {tuple(x.shape)} on {x.device}, {strides}"
        f"{held}; the kernel takes {wanted}, {kinds}, on the cpu, all of it in memory. Nothing was read or "
        "written. Please report this; LIGHTNING_EFF_KERNELS=0 goes without the compiled kernels."
    )
