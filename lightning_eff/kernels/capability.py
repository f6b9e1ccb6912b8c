"""Which product this machine should use, decided once by a measurement and remembered on disk."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_eff.functional.formats import Codes
from lightning_eff.functional.fp8 import E4M3
from lightning_eff.kernels.build import cache_directory, library, measurement_key
from lightning_eff.kernels.fp8 import fp8_product
from lightning_eff.kernels.products import code_product

SIZE = 384
"""Edge of the square product that is timed: large enough to leave the fixed cost of a call behind."""
Measured = dict[str, float | bool]


def _fastest_s(run: Callable[[], Tensor], rounds: int = 5) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _timed(native: Callable[[], Tensor], plain: Callable[[], Tensor], reference: Tensor) -> Measured:
    """Time both products and compare the native sums with ``reference``."""
    try:
        exact = torch.equal(native().cpu().to(reference.dtype), reference)
    except (RuntimeError, NotImplementedError):
        return {"native": False, "exact": False, "native_s": float("inf"), "plain_s": 0.0}
    native_s, plain_s = _fastest_s(native), _fastest_s(plain)
    return {"native": exact and native_s < plain_s, "exact": exact, "native_s": native_s, "plain_s": plain_s}


def _small_integers(dtype: torch.dtype, largest: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Two square operands of small integers, and their product."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-largest, largest + 1, (SIZE, SIZE), generator=generator) for _ in range(2))
    product = a.to(torch.float64) @ b.to(torch.float64)
    return a.to(device, dtype), b.to(device, dtype), product


def measure_int8(device: torch.device) -> Measured:
    """The int8 product against the one in float32.

    Returns:
        ``native_s`` and ``plain_s`` (seconds), ``exact`` (all sums equal), ``native`` (exact and faster).
    """
    a, b, product = _small_integers(torch.int8, 64, device)
    wide = a.to(torch.float32), b.to(torch.float32)
    return _timed(lambda: code_product(a, b, native=True), lambda: torch.mm(*wide), product)


def measure_fp8(device: torch.device) -> Measured:
    """The FP8 product against the one in bfloat16; see :func:`measure_int8`."""
    a, b, product = _small_integers(torch.float32, 8, device)
    one, wide = torch.ones((), dtype=torch.float32, device=device), (a.to(torch.bfloat16), b.to(torch.bfloat16))
    left, right = Codes(a.to(E4M3), one), Codes(b.t().contiguous().to(E4M3).t(), one)
    return _timed(lambda: fp8_product(left, right), lambda: torch.mm(*wide), product)


def measure_int16(device: torch.device) -> Measured:
    """The int16 product against the one in float32; see :func:`measure_int8`."""
    a, b, product = _small_integers(torch.int16, 64, device)
    wide = a.to(torch.float32), b.to(torch.float32)
    return _timed(lambda: code_product(a, b, native=True), lambda: torch.mm(*wide), product)


_MEASURES: dict[str, Callable[[torch.device], Measured]] = {
    "int8": measure_int8,
    "int16": measure_int16,
    "fp8": measure_fp8,
}


def _remembered(kind: str, device: torch.device) -> Measured:
    """The measurement from the cache directory, made now if it is not there."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    path = cache_directory() / f"{kind}-{measurement_key()}-{torch.__version__}-{name.replace(' ', '_')}.json"
    try:
        found: Measured = json.loads(path.read_text())
        return found
    except (OSError, ValueError):
        found = _MEASURES[kind](device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(found, file)
        Path(file.name).replace(path)
    except OSError:  # a read-only home directory: measure again in the next process
        return found
    return found


def _device(kind: str, index: int | None) -> torch.device:
    return torch.device(kind) if index is None else torch.device(kind, index)


@functools.cache
def _native(kind: str, device_type: str, index: int | None) -> bool:
    forced = os.environ.get(f"LIGHTNING_EFF_{kind.upper()}", "")
    if forced in ("0", "1"):
        return forced == "1"
    return bool(_remembered(kind, _device(device_type, index))["native"])


def native_int8(device: torch.device | str = "cpu") -> bool:
    """Whether products of int8 codes run natively on ``device``: exact and faster than float32 when measured.

    ``LIGHTNING_EFF_INT8=0`` or ``=1`` overrides the measurement.
    """
    device = torch.device(device)
    return device.type in ("cpu", "cuda") and _native("int8", device.type, device.index)


def native_int16(device: torch.device | str = "cpu") -> bool:
    """Whether products of int16 codes run natively on ``device``: a CPU where they were faster than float32.

    ``LIGHTNING_EFF_INT16=0`` or ``=1`` overrides the measurement.
    """
    device = torch.device(device)
    return device.type == "cpu" and _native("int16", device.type, device.index)


def native_fp8(device: torch.device | str = "cuda") -> bool:
    """Whether products of FP8 codes run natively on ``device``: a GPU where they were faster than bfloat16.

    ``LIGHTNING_EFF_FP8=0`` or ``=1`` overrides the measurement. A CPU has no such units.
    """
    device = torch.device(device)
    return device.type == "cuda" and _native("fp8", device.type, device.index)


def describe() -> dict[str, str]:
    """Facts about the fast paths on this machine, for ``python -m lightning_eff doctor``."""
    found = _remembered("int8", torch.device("cpu"))
    ratio = float(found["plain_s"]) / float(found["native_s"])
    return {
        "compiled quantisers": "yes" if library() is not None else "no (torch versions are used)",
        "int8 products": "native" if native_int8() else "emulated in float32",
        "int8 speed": f"{ratio:.1f}x float32 at {SIZE}^3, sums {'exact' if found['exact'] else 'NOT exact'}",
        "cache": str(cache_directory()),
    }
