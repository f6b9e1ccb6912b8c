"""Getting the compiled kernels, not getting them, and two processes getting them at once."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_eff.kernels import build, cache, compiler
from tests.kernels.building import copying, environment, forget, script, started, times_compiled

# Prints, for every world it is given, sums that any difference in a code, a scale or a product would change, whether
# there were kernels, and the warnings' categories.
PROGRAM = """
import json, os, sys, warnings, torch
from lightning_eff.functional.codes import Codes
from lightning_eff.kernels import build, convolution, products, quantize
from lightning_eff.kernels.geometry import Geometry
from tests.kernels.building import forget
def digest(t):
    return float((t.double().reshape(-1) * torch.arange(1, t.numel() + 1)).sum())
def sums():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 6, 7, 5, 8, generator=generator)
    grad = quantize.luq_codes(x, seed=7)
    scale = torch.tensor(0.4)
    codes, packed, unsigned = quantize.sawb_encode(x, pack=True, scale=scale)
    relu = quantize.sawb_encode(x.relu(), unsigned="mirror5", scale=scale)[0]
    yield from (digest(grad.codes), float(grad.scale), digest(codes.codes), digest(packed), unsigned)
    yield digest(relu.codes)
    yield from (digest(quantize.unpack_int4(packed, x.numel())), float(quantize.largest_magnitude(x)))
    geometry = Geometry((3, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1))
    weight = Codes(codes.codes.reshape(-1)[: 5 * 18 * 8].view(5, 18, 8), scale)
    y = convolution.conv_forward(codes, weight, geometry, native=True, bias=torch.ones(5))
    yield digest(y)
    yield digest(convolution.conv_weight_grad(quantize.luq_codes(y, seed=1), codes, geometry, native=True))
    yield digest(products.scaled_product(Codes(grad.codes.view(-1, 8), grad.scale),
                                         Codes(codes.codes.view(-1, 8).t()[:, :50], scale), native=True))
for world in json.loads(sys.argv[1]):
    os.environ.update(world)
    forget()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        numbers = list(sums())
    told = [w.category.__name__ for w in seen if "quantisers" in str(w.message)]
    print(json.dumps([numbers, build.library() is not None, told]))
"""


def test_switched_off_broken_and_compiled_give_the_same_numbers(tmp_path: Path) -> None:
    broken = script(tmp_path / "c++", "echo 'this compiler is broken' >&2\nexit 1")
    worlds = [
        {"LIGHTNING_EFF_KERNELS": "0", "LIGHTNING_EFF_CACHE": str(tmp_path / "off")},
        {"LIGHTNING_EFF_KERNELS": "1", "LIGHTNING_EFF_CACHE": str(tmp_path / "failed"), "CXX": str(broken)},
    ]
    if (kernels := build.library()) is not None:
        worlds += [{"LIGHTNING_EFF_CACHE": str(build.obtained().folder), "CXX": os.environ.get("CXX", "")}]
    command = [sys.executable, "-c", PROGRAM, json.dumps(worlds)]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    (numbers, *off), failed, *compiled = map(json.loads, done.stdout.splitlines())
    assert off == [False, []]
    assert failed == [numbers, False, ["FallbackWarning"]]
    assert not (tmp_path / "off").exists()
    if kernels is None:
        pytest.skip("no compiled kernels here")
    assert compiled == [[numbers, True, []]]


def test_one_process_builds_while_others_wait(tmp_path: Path, prebuilt: Path) -> None:
    cxx = copying(tmp_path, prebuilt, "sleep 1")
    code = "from lightning_eff.kernels.build import library; assert library() is not None"
    command = [sys.executable, "-W", "error::lightning_eff.errors.FallbackWarning", "-c", code]
    env = environment(tmp_path / "cache", CXX=str(cxx))
    processes = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=110)
        assert process.returncode == 0, errors
    assert times_compiled(tmp_path) == 1
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".lock", ".sha256", ".so"]


DAMAGE = """
import pathlib, sys, warnings
warnings.simplefilter("error")
from lightning_eff.kernels import build
assert build.library() is not None
(path,) = pathlib.Path(sys.argv[1]).glob("kernels-*.so")
whole = path.read_bytes()
for size in (len(whole), 0, 1, 64, 4096, len(whole) // 2, len(whole) - 1):
    with path.open("r+b") as file:  # in place: also what a process has mapped
        file.truncate(size)
    build.library().eff_fingerprint(None, 0)
    build.obtained.cache_clear()
    build.library.cache_clear()
    assert build.library() is not None
    assert path.read_bytes() == whole
    print("withstood", size)
"""


def test_a_library_cut_short_is_built_anew_and_kills_nobody(tmp_path: Path, prebuilt: Path) -> None:
    """In a process of its own: what it is about killed Python with SIGBUS."""
    env = environment(tmp_path / "cache", CXX=str(copying(tmp_path, prebuilt)))
    command = [sys.executable, "-c", DAMAGE, str(tmp_path / "cache")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110, check=False)
    assert (done.returncode, done.stdout.count("withstood")) == (0, 7), (done.stdout, done.stderr)
    assert times_compiled(tmp_path) == 7  # once, and for every damage but the first, which is none


# ------------------------------------------------------------------------------------------- what is in the cache


@pytest.fixture
def filled(place: Path, tmp_path: Path, prebuilt: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a library, made by a compiler that notes its starts; the library's path."""
    copying(tmp_path, prebuilt).rename(tmp_path / "g++")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
    assert started() == (True, "")
    (path,) = place.glob("*.so")
    return path


def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def test_without_the_compiler_what_it_made_is_used(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_compiler(monkeypatch, tmp_path)
    assert started() == (True, "")
    assert times_compiled(tmp_path) == 1


def test_the_library_of_another_machine_is_never_loaded(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared home: the file is whole, trusted, and would end this machine with an illegal instruction."""
    monkeypatch.setattr(build, "load", lambda *_: pytest.fail("loaded"))
    with monkeypatch.context() as patch:
        no_compiler(patch, tmp_path)
        patch.setattr(build, "cpu_facts", lambda: ("model name : another CPU", "flags : fpu vme"))
        found, said = started()
        assert not found
        assert "No C++ compiler was found" in said
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        started()


def test_a_measurement_of_another_machine_is_another_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = build.measurement_key()
    forget()
    monkeypatch.setattr(build, "cpu_facts", lambda: ("model name : another CPU",))
    assert build.measurement_key() != here


def test_machines_without_a_description_are_told_apart_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(*_: object, **__: object) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", hidden)
    build.cpu_facts.cache_clear()
    assert __import__("platform").node() in build.cpu_facts()
    build.cpu_facts.cache_clear()


@pytest.mark.parametrize("damage", ["cut", "no hash", "open to others", "garbage with its hash"])
def test_a_damaged_library_is_built_anew_or_named(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    if damage == "cut":
        filled.write_bytes(filled.read_bytes()[:-1])
    elif damage == "no hash":
        filled.with_name(filled.name + ".sha256").unlink()
    elif damage == "open to others":
        filled.chmod(0o666)
    else:
        cache.write_trusted(filled, b"garbage")
    with monkeypatch.context() as patch:
        no_compiler(patch, tmp_path)
        found, said = started()
        assert not found
        assert str(filled) in said
        assert "delete it" in said
        assert "No C++ compiler was found" in said
    assert started() == (True, "")
    assert times_compiled(tmp_path) == 2
    assert started() == (True, "")
    assert times_compiled(tmp_path) == 2


def test_the_next_build_removes_what_a_killed_one_left(
    place: Path, tmp_path: Path, prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = copying(tmp_path, prebuilt, f"echo $$ > {tmp_path}/pid; sleep 987")
    code = "from lightning_eff.kernels.build import library; library()"
    with subprocess.Popen([sys.executable, "-c", code], env=environment(place, CXX=str(slow))) as process:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert list(place.glob(f"{cache.SCRATCH}*"))
    os.killpg(int((tmp_path / "pid").read_text()), 9)  # the orphaned compiler
    monkeypatch.setenv("CXX", str(slow))  # the same name of the library
    copying(tmp_path, prebuilt)
    assert started() == (True, "")
    assert not list(place.glob(f"{cache.SCRATCH}*"))


@pytest.mark.parametrize("why", ["open to others", "cannot be made", "read-only", "full"])
def test_a_folder_that_cannot_be_used(
    place: Path, tmp_path: Path, prebuilt: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setenv("CXX", str(copying(tmp_path, prebuilt)))
    if why == "cannot be made":
        place.write_text("a file")
    else:
        place.mkdir()
    if why == "open to others":
        place.chmod(0o777)
    write, create = Path.write_bytes, os.open

    def full(self: Path, data: bytes) -> int:
        if place in self.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    def read_only(path: str | Path, flags: int, *more: int, **options: int) -> int:
        if flags & os.O_CREAT and place in Path(path).parents:
            raise OSError(errno.EROFS, "Read-only file system")
        return create(path, flags, *more, **options)

    if why == "full":
        monkeypatch.setattr(Path, "write_bytes", full)
    if why == "read-only":
        monkeypatch.setattr(os, "open", read_only)
    for times in (1, 2):  # said in every process; compiled in the first
        found, said = started()
        assert found
        assert f"The folder {place} cannot be used" in said
        assert f"{cache.private_directory()} is used instead" in said
        assert times_compiled(tmp_path) == 1, times
    cache.private_directory().chmod(0o777)
    found, said = started()
    assert not found
    assert f"The folder {cache.private_directory()} cannot be used" in said


def test_a_read_only_folder_with_a_library_is_used(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = os.open

    def read_only(path: str | Path, flags: int, *more: int, **options: int) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system")
        return create(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", read_only)
    assert started() == (True, "")


def test_kernels_that_cannot_be_kept_are_used(
    place: Path, tmp_path: Path, prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("CXX", str(copying(tmp_path, prebuilt)))
    monkeypatch.setattr(build, "write_trusted", full)
    found, said = started()
    assert found
    assert "No space left on device" in said
    assert "compile them anew" in said


@pytest.mark.parametrize("memory", ["none", "forbidden", "no /proc"])
def test_systems_that_cannot_load_from_memory(
    place: Path, tmp_path: Path, prebuilt: Path, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    def forbidden(*_: object) -> int:
        raise PermissionError

    if memory == "none":
        monkeypatch.delattr(os, "memfd_create")
    elif memory == "forbidden":
        monkeypatch.setattr(os, "memfd_create", forbidden)
    else:
        load = build.ctypes.CDLL
        monkeypatch.setattr(build.ctypes, "CDLL", lambda name: forbidden() if name.startswith("/proc/") else load(name))
    monkeypatch.setenv("CXX", str(copying(tmp_path, prebuilt)))
    assert started() == (True, "")  # from the unfinished file
    assert started() == (True, "")  # from the cache
    assert times_compiled(tmp_path) == 1


def test_the_machine_has_one_name() -> None:
    assert build.machine_key() == build.machine_key()
    assert len(build.machine_key()) == 16


def test_every_source_and_header_is_in_the_librarys_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {build.build_key.__wrapped__()}
    assert {path.name for path in compiler.HEADERS} == {"common.h"}
    assert len(compiler.SOURCES) > 5
    for kind in ("HEADERS", "SOURCES"):
        for changed in getattr(compiler, kind):
            copy = tmp_path / changed.name
            copy.write_text(changed.read_text() + "\n// changed\n")
            with monkeypatch.context() as patch:
                patch.setattr(build, kind, [copy if path == changed else path for path in getattr(compiler, kind)])
                names.add(build.build_key.__wrapped__())
    assert len(names) == 1 + len(compiler.HEADERS) + len(compiler.SOURCES)
