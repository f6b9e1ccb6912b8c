"""Compile ``src/*.cpp`` on first use and load it with ctypes.

The library has a plain C interface: it needs no torch headers, compiles in about a second and serves every torch
version. It is linked against the OpenMP runtime torch has loaded, so both share one pool of threads. The result is
cached under ``$LIGHTNING_EFF_CACHE`` (default ``~/.cache/lightning_eff``), keyed by source, compiler and CPU, and put
in place by an atomic rename: ranks that start together do not harm each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from lightning_eff.errors import FallbackWarning

SOURCES = sorted((Path(__file__).parent / "src").glob("*.cpp"))
FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=c++17"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
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
    "eff_int16_product": (_P, _L, _L, _P, _L, _L, _L, _L, _L, _P, _I),
}


def cache_directory() -> Path:
    """Where compiled code and the measured choice of product live."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lightning_eff"
    return Path(os.environ.get("LIGHTNING_EFF_CACHE", default))


@functools.cache
def machine_key() -> str:
    """A name for this kind of machine: CPU model and features, so that a shared home directory holds several."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    except OSError:
        facts = [platform.processor(), platform.machine()]
    return hashlib.sha256("\n".join([sys.platform, *facts]).encode()).hexdigest()[:16]


def _compiler() -> str | None:
    return next(
        (path for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name and (path := shutil.which(name))),
        None,
    )


def _openmp_of_torch() -> list[str]:
    """Link arguments for the OpenMP runtime inside the torch wheel, if it brings one."""
    import torch

    root = Path(torch.__file__).parent
    for folder in (root / "lib", root.parent / "torch.libs"):
        for library in sorted(folder.glob("libgomp*.so*")):
            return [str(library), f"-Wl,-rpath,{folder}"]
    return []


def _compile(compiler: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        command = [compiler, *FLAGS, *_wide_vectors(), *map(str, SOURCES), "-o", str(built), *_openmp_of_torch()]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        built.replace(target)


def _wide_vectors() -> list[str]:
    return ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, types in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    library.eff_fingerprint.argtypes, library.eff_fingerprint.restype = (_P, _L), ctypes.c_uint64
    return library


@functools.cache
def _build_key(compiler: str | None) -> str:
    """A name for what is compiled, how, and for which machine."""
    sources = b"".join(source.read_bytes() for source in SOURCES)
    how = repr((FLAGS, compiler, machine_key(), _openmp_of_torch()))
    return hashlib.sha256(sources + how.encode()).hexdigest()[:20]


def measurement_key() -> str:
    """A name for what a measurement of the kernels depends on: an upgrade measures anew."""
    return _build_key(_compiler())


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or ``None`` (with one :class:`FallbackWarning`) when they cannot be had here.

    ``LIGHTNING_EFF_KERNELS=0`` switches them off without a warning.
    """
    if os.environ.get("LIGHTNING_EFF_KERNELS", "1") == "0":
        return None
    try:
        compiler = _compiler()
        target = cache_directory() / f"kernels-{_build_key(compiler)}.so"
        if not target.exists():
            if compiler is None:
                raise FileNotFoundError("no C++ compiler found (looked for $CXX, g++, clang++, c++)")
            _compile(compiler, target)
        return _load(target)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(
            f"The compiled quantisers are not available, the slower torch versions with the same numbers are used: "
            f"{detail} Install a C++ compiler, or set LIGHTNING_EFF_KERNELS=0 to silence this.",
            FallbackWarning,
            stacklevel=2,
        )
        return None
