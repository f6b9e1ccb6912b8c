"""Compilers of every kind: missing, named with arguments, hanging, crashing, making nothing or nonsense."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_eff.kernels import build, cache, compiler
from tests.kernels.building import copying, environment, kernels_only, script, started


def test_a_compiler_that_makes_half_a_library_kills_nobody(tmp_path: Path, prebuilt: Path) -> None:
    half = tmp_path / "half.so"
    half.write_bytes(prebuilt.read_bytes()[:4096])
    cxx = script(tmp_path / "half-c++", f'cp {half} "$target"')
    done = run_short(environment(tmp_path / "cache", CXX=str(cxx)))
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "made a library that cannot be loaded" in done.stderr
    assert not list((tmp_path / "cache").glob("*.so*"))


def run_short(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    code = "from lightning_eff.kernels.build import library; assert library() is None"
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=110, check=False
    )


def lacking(tmp_path: Path) -> str:
    """Shell that makes a library without the functions."""
    (tmp_path / "empty.cpp").write_text("int nothing_of_ours;")
    return f'{compiler.find_compiler().command[0]} -shared {tmp_path}/empty.cpp -o "$target"'


COMPILERS: dict[str, tuple[str | Callable[[Path], str], str]] = {
    "prints no UTF-8": (r"printf '\377\376 \303\050 error' >&2; exit 1", "failed with status 1: .* error"),
    "prints nothing": ("exit 3", "failed with status 3: it printed nothing"),
    "prints a lot": ("yes error | head -c 3000000; exit 1", "failed with status 1"),
    "crashes": ("kill -SEGV $$", "was killed by signal 11"),
    "makes nothing": ("exit 0", "reported success and made no library"),
    "makes an empty file": (': > "$target"', "made a library that cannot be loaded: .*file too short"),
    "makes garbage": (
        'echo garbage of more bytes than a header has > "$target"',
        "made a library that cannot be loaded",
    ),
    "makes a folder": ('mkdir "$target"', "reported success and made no library"),
    "lacks functions": (lacking, "made a library that cannot be loaded: a function is missing: .*eff_"),
    "waits for input": ("cat; exit 1", "failed with status 1"),
}


@kernels_only
@pytest.mark.parametrize("kind", COMPILERS)
def test_whatever_a_compiler_does_is_told_in_one_warning(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    text, expected = COMPILERS[kind]
    text = text if isinstance(text, str) else text(tmp_path)
    monkeypatch.setenv("CXX", str(script(tmp_path / "my c++", text)))
    found, said = started()
    assert not found
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(said)
    assert "LIGHTNING_EFF_KERNELS=0" in said
    assert [path.name for path in place.iterdir()] == [cache.LOCK]


def test_a_program_that_cannot_be_run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c++").write_bytes(b"\x7fELF and nothing more")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    found, said = started()
    assert not found
    assert "cannot be run" in said


def test_a_compiler_that_hangs_is_ended_with_its_children(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "LIMIT_S", 0.5)
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", f"sleep 987 & echo $! > {tmp_path}/child; wait")))
    start = time.monotonic()
    found, said = started()
    assert not found
    assert "did not end within" in said
    assert time.monotonic() - start < 20
    child = int((tmp_path / "child").read_text())
    for _ in range(100):  # the child's new parent may take a moment to bury it
        status = Path(f"/proc/{child}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the compiler's child still runs")


def test_waiting_for_another_process_has_an_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "LIMIT_S", 0.2)
    place.mkdir()
    with cache.locked(place, time.monotonic()):
        found, said = started()
    assert not found
    assert "another process has held" in said


def test_the_words_of_cxx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("g++", "ccache", "my c++"):
        script(tmp_path / name, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {}
    for given in ("", "  ", "g++ -O1", "ccache g++", f"{tmp_path}/my c++", f"'{tmp_path}/my c++' -O1", "g++"):
        monkeypatch.setenv("CXX", given)
        command, complaint = compiler.find_compiler()
        assert complaint == ""
        found[given] = [word.removeprefix(f"{tmp_path}/") for word in command]
    assert list(found.values()) == [
        *(["g++"], ["g++"], ["g++", "-O1"], ["ccache", "g++"], ["my c++"], ["my c++", "-O1"], ["g++"]),
    ]


@pytest.mark.parametrize("given", ["no-such-compiler", "no-such-compiler -O1", "g++ 'unclosed", "/", "/dev/null"])
def test_a_compiler_that_is_not_there_is_said(
    place: Path, tmp_path: Path, prebuilt: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("CXX", given)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    found, said = started()
    assert not found
    assert f"CXX={given!r} names no program" in said
    assert "No C++ compiler was found" in said
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.defpath}")
    copying(tmp_path, prebuilt).rename(tmp_path / "bin" / "g++")
    found, said = started()
    assert found
    assert f"CXX={given!r} names no program" in said
    assert "g++ compiled them" in said
    assert started() == (True, "")  # the kernels are there: no compiler is needed


def test_arguments_reach_the_compiler(
    place: Path, tmp_path: Path, prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cxx = copying(tmp_path, prebuilt)
    cxx.write_text(cxx.read_text().replace("#!/bin/sh", f'#!/bin/sh\necho "$1" > {tmp_path}/first'))
    monkeypatch.setenv("CXX", f"{cxx} -O1")
    assert started() == (True, "")
    assert (tmp_path / "first").read_text() == "-O1\n"
