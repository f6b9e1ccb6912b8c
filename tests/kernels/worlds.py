"""Settings of torch that are none of a kernel's business: nothing it computes may follow them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@contextlib.contextmanager
def _set(get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> Generator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def _default(dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: _set(torch.get_default_dtype, torch.set_default_dtype, dtype)


def _precision(name: str) -> Callable[[], Any]:
    return lambda: _set(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, name)


@contextlib.contextmanager
def _deterministic() -> Generator[None]:
    """Fresh memory is full of NaN, too."""
    with _set(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True):
        yield


Worlds = dict[str, Callable[[], Any]]
DTYPES: Worlds = {
    "float64": _default(torch.float64),
    "bfloat16": _default(torch.bfloat16),
    "float16": _default(torch.float16),
}
DEVICE: Worlds = {"meta": lambda: torch.device("meta")}
PRODUCTS: Worlds = {"high": _precision("high"), "medium": _precision("medium")}
AUTOCAST: Worlds = {
    f"autocast {dtype}": lambda dtype=dtype: torch.autocast("cpu", dtype) for dtype in (torch.bfloat16, torch.float16)
}
MEMORY: Worlds = {"deterministic": _deterministic}
GRADIENTS: Worlds = {"no grad": torch.no_grad, "grad": torch.enable_grad, "inference": torch.inference_mode}
THREADS: Worlds = {"two threads": lambda: _set(torch.get_num_threads, torch.set_num_threads, 2)}


def _same(left: Any, right: Any) -> bool:
    """Whether all leaves are alike; tensors in dtype, shape and bytes: NaN equals itself, and 0.0 is not -0.0."""
    pairs = list(zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True))
    return all(_same_bits(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    a_bytes, b_bytes = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a_bytes, b_bytes)


def same_everywhere(compute: Callable[[], Any], *worlds: Worlds) -> list[str]:
    """The worlds in which ``compute`` gives other bits than outside of them; empty is good."""
    expected, found = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), compute()), []
    for name, world in {key: world for part in worlds for key, world in part.items()}.items():
        with world():
            result = compute()
        if not _same(result, expected):
            found.append(name)
    return found
