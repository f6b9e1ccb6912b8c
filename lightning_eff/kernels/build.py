"""Build the compiled kernels from ``src`` on first use and load them with ctypes.

The library has a plain C interface: it needs no torch headers and serves every torch version. Compiling takes one core
five to seven seconds (g++ 12 at ``-O3``; two compilers side by side gained nothing on two busy cores), once per
machine: one process builds while others wait. The result is kept in ``$LIGHTNING_EFF_CACHE`` (default
``~/.cache/lightning_eff``) under a name made of sources, flags, ``$CXX`` and CPU, and checked before every use as
:mod:`lightning_eff.kernels.cache` says. It is linked against the OpenMP runtime torch has loaded, so both share one
pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

from lightning_eff.errors import FallbackWarning
from lightning_eff.kernels.cache import (
    in_usable_folder,
    locked,
    read_trusted,
    remove_leftovers,
    scratch_folder,
    write_trusted,
)
from lightning_eff.kernels.compiler import (
    FLAGS,
    HEADERS,
    SOURCES,
    CompilerError,
    asked_compiler,
    compile_library,
    find_compiler,
    openmp_of_torch,
)

LIMIT_S = 300.0
"""Waiting for another process's build and building take at most this long together."""
_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "eff_max_abs": (_P, _I, _L, _P, _I),
    "eff_sawb_scale": (_P, _I, _L, _I, _P, _P, _P, _I),
    "eff_sawb_codes": (_P, _I, _L, _P, _I, _P, _P, _I),
    "eff_luq_scale": (_P, _I, _I, _P),
    "eff_luq_codes": (_P, _I, _L, _P, _P, _I, ctypes.c_uint64, _P, _P, _I),
    "eff_unpack": (_P, _L, _I, _P, _I),
    "eff_fp8_scale": (_P, _F, _I, _P),
    "eff_fp8_encode": (_P, _I, _L, _P, _I, _P, _P, _P, _I),
    "eff_fp8_encode_lines": (_P, _I, _L, _L, _I, _I, _P, _P, _P, _P, _P, _P, _I),
    "eff_fp8_decode": (_P, _L, _I, _P, _I),
    "eff_relu": (_P, _I, _L, _P, _P, _I),
    "eff_relu_grad": (_P, _I, _P, _L, _P, _I),
    "eff_scale": (_P, _I, _L, _L, _P, _P, _F, _P, _P, _I, _L, _I),
    "eff_scale_rows": (_P, _I, _L, _L, _P, _P, _F, _P, _P, _I, _I),
    "eff_gather": (_P, _L, _P, _L, _P, _P, _L, _P, _P, _I),
    "eff_bf16_stochastic": (_P, _L, ctypes.c_uint64, _P, _I),
    "eff_bf16_kahan": (_P, _P, _P, _L, _I, _I),
    "eff_bf16_split": (_P, _L, _P, _P, _I),
    "eff_bf16_join": (_P, _P, _L, _P, _I),
    "eff_bf16_sgd": (_P, _P, _P, _P, _L, _I, ctypes.c_uint64, _F, _F, _F, _F, _I, _I, _I, _I),
    "eff_float_format": (_P, _I, _L, _P, _I, ctypes.c_uint64, _P, _I, _P, _I),
    "eff_prune": (_P, _I, _L, _F, ctypes.c_uint64, _P, _P, _I),
    "eff_integer_encode": (_P, _I, _L, _P, _I, _I, _I, ctypes.c_uint64, _P, _P, _P, _I),
    "eff_round_to_scale": (_P, _I, _L, _P, _I, _P, _I),
    "eff_int16_native": (_P,),
    "eff_transpose": (_P, _I, _L, _L, _L, _P, _I),
    "eff_int16_product": (_P, _L, _L, _P, _L, _L, _L, _L, _L, _P, _I),
}


class Obtained(NamedTuple):
    """The compiled kernels or ``None``, the folder they are kept in, and what people should know about that."""

    kernels: ctypes.CDLL | None
    folder: Path | None
    said: tuple[str, ...]


@functools.cache
def cpu_facts() -> tuple[str, ...]:
    """Return the processor's model and features as Linux tells them, elsewhere what is known, or the host's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    facts = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return tuple(facts) or (platform.processor(), platform.machine(), platform.node())


@functools.cache
def machine_key() -> str:
    """Return a name for this kind of machine, CPU model and features: a shared home directory holds several."""
    return hashlib.sha256("\n".join([sys.platform, *cpu_facts()]).encode()).hexdigest()[:16]


@functools.cache
def build_key() -> str:
    """Return a name for what is compiled, how, and for which machine.

    Of the compiler only ``$CXX`` counts: a machine from which it has been removed goes on using what it made.
    """
    sources = b"".join(source.read_bytes() for source in (*HEADERS, *SOURCES))
    how = repr((FLAGS, asked_compiler(), machine_key(), openmp_of_torch()))
    return hashlib.sha256(sources + how.encode(errors="surrogateescape")).hexdigest()[:20]


def measurement_key() -> str:
    """Return a name for what a measurement of the kernels depends on: an upgrade measures anew."""
    return build_key()


def load(data: bytes, path: Path) -> ctypes.CDLL:
    """Load exactly the bytes that were checked; an OSError if they are no library or lack a function."""
    library = _open(data, path)
    try:
        for name, types in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
        library.eff_fingerprint.argtypes, library.eff_fingerprint.restype = (_P, _L), ctypes.c_uint64
    except AttributeError as error:
        raise OSError(f"a function is missing: {error}") from error
    return library


def _open(data: bytes, path: Path) -> ctypes.CDLL:
    """Map a library from memory where the system can.

    From the file, what others do to it later would kill this process: cut it short, replace it on a network share.
    """
    try:
        descriptor = os.memfd_create(path.name)
    except (AttributeError, OSError):  # not Linux, or forbidden
        return ctypes.CDLL(str(path))
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    try:  # the descriptor stays open: the loader knows a library by its path, which must not come to mean another one
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError:  # no /proc
        os.close(descriptor)
        return ctypes.CDLL(str(path))


def _cached(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The kernels from a file of the cache, or why it could not be used (empty: there is none)."""
    try:
        data = read_trusted(path)
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"{error}. "
    try:
        return load(data, path), ""
    except OSError as error:
        return None, f"{path} cannot be loaded ({error}); delete it. "


def _from_folder(folder: Path, until: float) -> Obtained:
    """The kernels from ``folder``; built, if need be, by the one process that holds its lock."""
    path = folder / f"kernels-{build_key()}.so"
    kernels, _ = _cached(path)
    if kernels is not None:
        return Obtained(kernels, folder, ())
    with locked(folder, until) as held:
        kernels, damage = _cached(path)  # another process may have built it meanwhile
        if kernels is not None:
            return Obtained(kernels, folder, ())
        if held:
            remove_leftovers(folder)
        try:
            return _build(path, until)
        except CompilerError as error:
            raise CompilerError(f"{damage}{error}") from error


def _build(path: Path, until: float) -> Obtained:
    compiler, said = find_compiler(), []
    with scratch_folder(path.parent) as scratch:
        built = compile_library(compiler, scratch, max(until - time.monotonic(), 0.0))
        data = built.read_bytes()
        try:
            kernels = load(data, built)
        except OSError as error:
            raise CompilerError(f"{compiler.command[0]} made a library that cannot be loaded: {error}.") from error
    if compiler.complaint:
        said.append(f"{compiler.complaint}{compiler.command[0]} compiled them.")
    try:
        write_trusted(path, data)
    except OSError as error:
        said.append(f"{path} cannot be written ({error}), every process has to compile them anew.")
    return Obtained(kernels, path.parent, tuple(said))


@functools.cache
def obtained() -> Obtained:
    """Load or build the kernels, in the private folder if the cache cannot be used, and tell what was wrong."""
    if os.environ.get("LIGHTNING_EFF_KERNELS", "1") == "0":
        return Obtained(None, None, ())
    said: list[str] = []
    until = time.monotonic() + LIMIT_S
    try:
        if found := in_usable_folder(lambda folder: _from_folder(folder, until), said):
            instead = [f"{found.folder} is used instead."] if said else []
            return found._replace(said=(*said, *instead, *found.said))
    except (CompilerError, TimeoutError) as error:
        said.append(str(error))
    return Obtained(None, None, tuple(said))


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or ``None`` (with one :class:`FallbackWarning`) when they cannot be had here.

    One FallbackWarning, too, where they are there but not from the folder asked for, or not by the compiler asked for.
    ``LIGHTNING_EFF_KERNELS=0`` switches them off without a warning.
    """
    found = obtained()
    if found.said:
        state = (
            "are not available, the slower torch versions with the same numbers are used"
            if found.kernels is None
            else "are used, but not as asked for"
        )
        warnings.warn(
            f"The compiled quantisers {state}: {' '.join(found.said)} "
            "LIGHTNING_EFF_KERNELS=0 switches them off without this warning.",
            FallbackWarning,
            stacklevel=2,
        )
    return found.kernels
