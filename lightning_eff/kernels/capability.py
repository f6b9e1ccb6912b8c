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

from lightning_eff.kernels.build import cache_directory, library, machine_key
from lightning_eff.kernels.products import code_product

SIZE = 384
"""Edge of the square product that is timed: large enough to leave the fixed cost of a call behind."""


def _fastest_s(run: Callable[[], Tensor], rounds: int = 5) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def measure(device: torch.device) -> dict[str, float | bool]:
    """Time one product of codes both ways and compare every sum.

    Returns:
        ``native_s`` and ``float32_s`` (seconds), ``exact`` (all sums equal), ``native`` (exact and faster).
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-64, 65, (SIZE, SIZE), generator=generator).to(device, torch.int8) for _ in range(2))
    try:
        native = code_product(a, b, native=True).clone()
    except (RuntimeError, NotImplementedError):
        return {"native": False, "exact": False, "native_s": float("inf"), "float32_s": 0.0}
    reference = (a.cpu().to(torch.float64) @ b.cpu().to(torch.float64)).to(torch.int32)
    exact = torch.equal(native.cpu(), reference)
    wide = a.to(torch.float32), b.to(torch.float32)
    native_s = _fastest_s(lambda: code_product(a, b, native=True))
    float32_s = _fastest_s(lambda: torch.mm(*wide))
    return {"native": exact and native_s < float32_s, "exact": exact, "native_s": native_s, "float32_s": float32_s}


def _remembered(device: torch.device) -> dict[str, float | bool]:
    """The measurement from the cache directory, made now if it is not there."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    path = cache_directory() / f"product-{machine_key()}-{torch.__version__}-{kind.replace(' ', '_')}.json"
    try:
        found: dict[str, float | bool] = json.loads(path.read_text())
        return found
    except (OSError, ValueError):
        found = measure(device)
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
def _native(device_type: str, index: int | None) -> bool:
    forced = os.environ.get("LIGHTNING_EFF_INT8", "")
    if forced in ("0", "1"):
        return forced == "1"
    return bool(_remembered(_device(device_type, index))["native"]) if device_type in ("cpu", "cuda") else False


def native_int8(device: torch.device | str = "cpu") -> bool:
    """Whether products of int8 codes run natively on ``device``: exact and faster than float32 when measured.

    ``LIGHTNING_EFF_INT8=0`` or ``=1`` overrides the measurement.
    """
    device = torch.device(device)
    return _native(device.type, device.index)


def describe() -> dict[str, str]:
    """Facts about the fast paths on this machine, for ``python -m lightning_eff doctor``."""
    found = _remembered(torch.device("cpu"))
    ratio = float(found["float32_s"]) / float(found["native_s"])
    return {
        "compiled quantisers": "yes" if library() is not None else "no (torch versions are used)",
        "int8 products": "native" if native_int8() else "emulated in float32",
        "int8 speed": f"{ratio:.1f}x float32 at {SIZE}^3, sums {'exact' if found['exact'] else 'NOT exact'}",
        "cache": str(cache_directory()),
    }
