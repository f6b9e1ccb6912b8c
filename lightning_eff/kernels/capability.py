"""Which product this machine should use, decided once by a measurement and remembered on disk.

The last bits of a run may depend on the choice (int16 and FP8 products add up in another order than the wide ones), so
all processes of a machine go by the same one: the first to hold the cache's lock measures, the others read what it has
written. Where nothing can be written, timing does not count: every process takes the native product if it is exact and
the device has units for it, which is the same everywhere on the machine. The choice lasts as long as the file and
changes with the kernels, torch and the device. Ranks on different machines go by the measurement of their own; their
gradients are averaged, so replicas stay equal, but last bits may differ from a run on other machines
(``LIGHTNING_EFF_INT16=1``, for instance, on all of them makes one choice).
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_eff.functional.codes import Codes
from lightning_eff.functional.numerics.fp8 import FP8_E4M3
from lightning_eff.kernels.build import LIMIT_S, cpu_facts, library, measurement_key, obtained
from lightning_eff.kernels.cache import cache_directory, in_usable_folder, locked, read_trusted, write_trusted
from lightning_eff.kernels.compiler import SOURCES, find_compiler
from lightning_eff.kernels.fp8 import fp8_product
from lightning_eff.kernels.int16 import int16_native
from lightning_eff.kernels.products import code_product

SIZE = 384
"""Edge of the square product that is timed: large enough to leave the fixed cost of a call behind."""
Measured = dict[str, float | bool]
_LEAST_CAPABILITY = {"int8": (7, 5), "fp8": (8, 9)}  # of NVIDIA GPUs with such units
_KEYS = {"native": bool, "exact": bool, "native_s": float, "plain_s": float}


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
    generator = torch.Generator("cpu").manual_seed(0)
    a, b = (
        torch.randint(-largest, largest + 1, (SIZE, SIZE), generator=generator, dtype=torch.int64, device="cpu")
        for _ in range(2)
    )
    product = a.to(torch.float64) @ b.to(torch.float64)
    return a.to(device, dtype), b.to(device, dtype), product


def measure_int8(device: torch.device) -> Measured:
    """Measure the int8 product against the one in float32.

    Returns:
        ``native_s`` and ``plain_s`` (seconds), ``exact`` (all sums equal), ``native`` (exact and faster).
    """
    a, b, product = _small_integers(torch.int8, 64, device)
    wide = a.to(torch.float32), b.to(torch.float32)
    return _timed(lambda: code_product(a, b, native=True), lambda: torch.mm(*wide), product)


def measure_fp8(device: torch.device) -> Measured:
    """Measure the FP8 product against the one in bfloat16; see :func:`measure_int8`."""
    a, b, product = _small_integers(torch.float32, 8, device)
    one, wide = torch.ones((), dtype=torch.float32, device=device), (a.to(torch.bfloat16), b.to(torch.bfloat16))
    left, right = Codes(a.to(FP8_E4M3), one), Codes(b.t().contiguous().to(FP8_E4M3).t(), one)
    return _timed(lambda: fp8_product(left, right), lambda: torch.mm(*wide), product)


def measure_int16(device: torch.device) -> Measured:
    """Measure the int16 product against its emulation; see :func:`measure_int8`."""
    a, b, product = _small_integers(torch.int16, 64, device)
    return _timed(lambda: code_product(a, b, native=True), lambda: code_product(a, b, native=False), product)


_MEASURES: dict[str, Callable[[torch.device], Measured]] = {
    "int8": measure_int8,
    "int16": measure_int16,
    "fp8": measure_fp8,
}


def measure(kind: str, device: torch.device) -> Measured:
    """Measure now, whatever context of Lightning this is called in."""
    with torch.autocast(device.type, enabled=False):
        return _MEASURES[kind](device)


def remembered(kind: str, device: torch.device) -> Measured:
    """Return the measurement all processes of this machine go by, made now if it is not there."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    kernels = "torch" if library() is None else "compiled"  # asked before the lock is taken: building takes it, too
    file = re.sub(r"[^\w.+-]", "_", f"{kind}-{measurement_key()}-{kernels}-{torch.__version__}-{name}")[:200] + ".json"
    try:
        found = in_usable_folder(lambda folder: _agreed(folder / file, kind, device), [])
    except TimeoutError:
        found = None
    return _undisputed(kind, device) if found is None else found


def _agreed(path: Path, kind: str, device: torch.device) -> Measured:
    """The measurement in ``path``; the first process that holds the lock makes it. An OSError if it cannot be kept."""
    if (found := _read(path)) is not None:
        return found
    with locked(path.parent, time.monotonic() + LIMIT_S) as held:
        if not held:
            raise OSError(f"{path.parent} has no locks")
        if (found := _read(path)) is None:
            found = measure(kind, device)
            write_trusted(path, json.dumps(found).encode())
        return found


def _read(path: Path) -> Measured | None:
    """What an earlier process measured, if it can be trusted and makes sense."""
    try:
        found = json.loads(read_trusted(path))
    except (OSError, ValueError, RecursionError):
        return None
    return found if makes_sense(found) else None


def makes_sense(found: object) -> bool:
    """Tell whether what was read is a measurement: its keys, types and numbers fit each other."""
    if not isinstance(found, dict) or {key: type(value) for key, value in found.items()} != _KEYS:
        return False
    times = found["native_s"], found["plain_s"]
    return not any(math.isnan(t) or t < 0 for t in times) and (found["exact"] or not found["native"])


def _undisputed(kind: str, device: torch.device) -> Measured:
    """The choice without a place to agree on: what every process of this machine finds alike, whatever it timed."""
    found = measure(kind, device)
    return {**found, "native": bool(found["exact"]) and has_units(kind, device)}


def has_units(kind: str, device: torch.device) -> bool:
    """Return whether the processor multiplies such codes in units of their own."""
    if device.type == "cuda":
        return kind in _LEAST_CAPABILITY and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY[kind]
    if kind == "int16":
        return int16_native()
    words = {word for fact in cpu_facts() for word in fact.split()}
    return kind == "int8" and not words.isdisjoint(("avx512_vnni", "avx_vnni", "amx_int8"))


def _device(kind: str, index: int | None) -> torch.device:
    return torch.device(kind) if index is None else torch.device(kind, index)


@functools.cache
def is_native(kind: str, device_type: str, index: int | None) -> bool:
    """Tell whether products of this kind run natively: as the environment says, or as was measured."""
    forced = os.environ.get(f"LIGHTNING_EFF_{kind.upper()}", "")
    if forced in ("0", "1"):
        return forced == "1"
    return bool(remembered(kind, _device(device_type, index))["native"])


def native_int8(device: torch.device | str = "cpu") -> bool:
    """Return whether products of int8 codes run natively on ``device``: exact and faster than float32 when measured.

    ``LIGHTNING_EFF_INT8=0`` or ``=1`` overrides the measurement.
    """
    device = torch.device(device)
    return device.type in ("cpu", "cuda") and is_native("int8", device.type, device.index)


def native_int16(device: torch.device | str = "cpu") -> bool:
    """Return whether products of int16 codes run natively on ``device``: a CPU where they were faster than emulated.

    ``LIGHTNING_EFF_INT16=0`` or ``=1`` overrides the measurement.
    """
    device = torch.device(device)
    return device.type == "cpu" and is_native("int16", device.type, device.index)


def native_fp8(device: torch.device | str = "cuda") -> bool:
    """Return whether products of FP8 codes run natively on ``device``: a GPU where they were faster than bfloat16.

    ``LIGHTNING_EFF_FP8=0`` or ``=1`` overrides the measurement. A CPU has no such units.
    """
    device = torch.device(device)
    return device.type == "cuda" and is_native("fp8", device.type, device.index)


def describe() -> dict[str, str]:
    """Return facts about the fast paths on this machine, for ``python -m lightning_eff doctor``."""
    cpu, kernels, compiler = torch.device("cpu"), obtained(), find_compiler()
    return {
        "compiled quantisers": "yes" if library() is not None else "no (torch versions are used)",
        "compiled families": ", ".join(source.stem for source in SOURCES) if library() is not None else "none",
        "int8 products": "native" if native_int8() else "emulated in float32",
        "int8 speed": _speed(remembered("int8", cpu), "float32"),
        "int16 products": "native" if native_int16() else "emulated in float64",
        "int16 speed": _speed(remembered("int16", cpu), "float64"),
        "fp8 products": "native" if torch.cuda.is_available() and native_fp8() else "emulated in bfloat16",
        "compiler": f"{compiler.complaint}{' '.join(compiler.command) or 'none found'}",
        "cache": str(kernels.folder or cache_directory()),
        "cache state": " ".join(kernels.said) or ("checked and used" if kernels.kernels else "not used"),
    }


def _speed(found: Measured, plain: str) -> str:
    """How the native product compares with the one in ``plain``."""
    speed = f"{found['plain_s'] / found['native_s']:.1f}x {plain} at {SIZE}^3" if found["native_s"] else "not measured"
    return f"{speed}, sums {'exact' if found['exact'] else 'NOT exact'}"
