"""How a file of the cache is written: whole or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_eff.kernels import cache

DATA = b"what was measured"


def written(folder: Path, data: bytes = DATA) -> Path:
    cache.write_trusted(folder / "file", data)
    return folder / "file"


def test_content_reaches_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, rename = os.fsync, Path.replace

    def noted_sync(descriptor: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name.partition('-scratch')[0]}")
        sync(descriptor)

    def noted_rename(self: Path, target: Path) -> Path:
        done.append(f"rename to {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_rename)
    written(tmp_path)
    assert done == ["sync kernels", "rename to file", "sync kernels", "rename to file.sha256", f"sync {tmp_path.name}"]


@pytest.mark.parametrize("before", [None, b"an older one"])
@pytest.mark.parametrize("step", range(5))
def test_a_write_that_ends_early_leaves_nothing_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes | None, step: int
) -> None:
    if before is not None:
        written(tmp_path, before)
    steps = iter(range(5))

    def full(work: Callable[..., object]) -> Callable[..., object]:
        def act(*arguments: object) -> object:
            if next(steps) == step:
                raise OSError(errno.ENOSPC, "No space left on device")
            return work(*arguments)

        return act

    monkeypatch.setattr(os, "fsync", full(os.fsync))
    monkeypatch.setattr(Path, "replace", full(Path.replace))
    # Only the sync of the folder, the last step, may fail unseen: the file is there.
    with contextlib.nullcontext() if step == 4 else pytest.raises(OSError, match="No space left"):
        written(tmp_path)
    try:
        assert cache.read_trusted(tmp_path / "file") == (DATA if step == 4 else before)
    except FileNotFoundError:
        assert before is None
    except cache.UntrustedError:
        assert step in (2, 3)  # between the two names
    assert not list(tmp_path.glob(f"{cache.SCRATCH}*"))


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    build = tmp_path / f"{cache.SCRATCH}of-a-killed-build"
    build.mkdir()
    (build / "something").write_text("in it")
    (tmp_path / f"{cache.SCRATCH}file").touch()
    (tmp_path / "tmpabcdefgh").mkdir()
    path = written(tmp_path)
    cache.remove_leftovers(tmp_path)
    assert {found.name for found in tmp_path.iterdir()} == {"tmpabcdefgh", "file", "file.sha256"}
    assert cache.read_trusted(path) == DATA


# --------------------------------------------------------------------------------------------------------- lock


def test_one_holds_the_lock_and_others_wait(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        with cache.locked(tmp_path, time.monotonic() + 30) as held:
            assert held
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.02)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_waiting_has_an_end(tmp_path: Path) -> None:
    with cache.locked(tmp_path, time.monotonic()):
        start = time.monotonic()
        said = r"another process has held .*kernels\.lock for too long"
        with pytest.raises(TimeoutError, match=said), cache.locked(tmp_path, start + 0.2):
            pytest.fail("held twice")
        assert 0.2 <= time.monotonic() - start < 5
    with cache.locked(tmp_path, time.monotonic()) as held:
        assert held


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)"
    command = [sys.executable, "-S", "-c", f"{code}; time.sleep(100)", str(tmp_path / cache.LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(TimeoutError), cache.locked(tmp_path, time.monotonic()):
            pytest.fail("held twice")
        process.kill()
        process.wait()
    with cache.locked(tmp_path, time.monotonic()) as held:
        assert held


def test_a_child_forked_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    with cache.locked(tmp_path, time.monotonic()):
        (descriptor,) = [
            int(entry.name)
            for entry in Path("/proc/self/fd").iterdir()
            if entry.is_symlink() and entry.readlink() == tmp_path / cache.LOCK
        ]
        inherited = os.dup(descriptor)  # a forked child has the same open file
    with cache.locked(tmp_path, time.monotonic()) as held:
        assert held
    os.close(inherited)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with cache.locked(tmp_path, time.monotonic()) as held:
        assert not held
