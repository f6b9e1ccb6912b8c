"""A file in the cache is never trusted: whatever lies there is what was written, or it is not used."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_eff.kernels import cache

STRANGER = 12345
DATA = b"what was measured"


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a path one of another user: really where tests run as root, else by becoming somebody else."""
    if os.geteuid() == 0:
        os.chown(path, STRANGER, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)


def written(folder: Path, data: bytes = DATA) -> Path:
    cache.write_trusted(folder / "file", data)
    return folder / "file"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def used_folder() -> tuple[Path | None, list[str]]:
    said: list[str] = []
    return cache.in_usable_folder(lambda folder: folder, said), said


# ------------------------------------------------------------------------------------------------------ content


@given(st.binary(max_size=300), st.data())
def test_what_is_read_is_what_was_written(data: bytes, draw: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = written(Path(name), data)
        assert cache.read_trusted(path) == data
        damaged = draw.draw(st.one_of(st.binary(max_size=300), st.integers(0, 300).map(lambda cut: data[:cut])))
        path.write_bytes(damaged)
        if damaged == data:
            assert cache.read_trusted(path) == data
        else:
            with pytest.raises(cache.UntrustedError, match=r"file is damaged.*file\.sha256; delete it"):
                cache.read_trusted(path)
        cache.write_trusted(path, data)
        assert cache.read_trusted(path) == data


@pytest.mark.parametrize("recorded", [None, b"", b"\xff\xfe", b"0" * 64, b"abc"])
def test_the_recorded_hash_is_not_trusted_either(tmp_path: Path, recorded: bytes | None) -> None:
    path, beside = written(tmp_path), tmp_path / "file.sha256"
    beside.unlink()
    if recorded is not None:
        beside.write_bytes(recorded)
    with pytest.raises(cache.UntrustedError, match="delete it"):
        cache.read_trusted(path)


def test_sha256sum_checks_the_file(tmp_path: Path) -> None:
    written(tmp_path)
    subprocess.run(["sha256sum", "-c", "file.sha256"], cwd=tmp_path, check=True, capture_output=True)


def a_huge_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def a_full_folder(path: Path) -> None:
    path.mkdir()
    (path / "something").write_text("in it")


THINGS: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "full folder": a_full_folder,
    "pipe": os.mkfifo,
    "huge file": a_huge_file,
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("name", ["file", "file.sha256"])
@pytest.mark.parametrize("thing", THINGS)
def test_other_things_in_its_place_are_refused_and_replaced(tmp_path: Path, name: str, thing: str) -> None:
    path = written(tmp_path)
    (tmp_path / name).unlink()
    THINGS[thing](tmp_path / name)
    with pytest.raises(OSError, match="file"):
        cache.read_trusted(path)
    assert cache.read_trusted(written(tmp_path)) == DATA


# -------------------------------------------------------------------------------------------------------- owner


@pytest.mark.parametrize("name", ["file", "file.sha256"])
@pytest.mark.parametrize("mode", [0o664, 0o646, 0o622, 0o777])
def test_what_others_may_write_is_not_read(tmp_path: Path, name: str, mode: int) -> None:
    path = written(tmp_path)
    (tmp_path / name).chmod(mode)
    with pytest.raises(cache.UntrustedError, match=f"{name} was not used: others may write to it .mode {mode:04o}"):
        cache.read_trusted(path)
    assert cache.read_trusted(written(tmp_path)) == DATA


@pytest.mark.parametrize("name", ["file", "file.sha256"])
def test_what_others_own_is_not_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    give_away(tmp_path / name, monkeypatch)
    with pytest.raises(cache.UntrustedError, match="was not used: it belongs to user"):
        cache.read_trusted(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of root")
def test_what_root_owns_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert cache.read_trusted(path) == DATA


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_whatever_the_umask_only_the_user_may_write(
    tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_EFF_CACHE", str(tmp_path / "above" / "cache"))
    before = os.umask(umask)
    try:
        folder, said = used_folder()
        assert folder is not None
        assert said == []
        assert cache.read_trusted(written(folder)) == DATA
        with cache.locked(folder, time.monotonic()):
            pass
    finally:
        os.umask(before)
    for path in (folder, *folder.iterdir()):
        assert path.stat().st_mode & 0o022 == 0, path


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
def test_a_folder_others_may_write_to_is_left_for_a_private_one(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(mode)
    monkeypatch.setenv("LIGHTNING_EFF_CACHE", str(open_to_all))
    private, said = used_folder()
    assert private == temporary / f"lightning_eff-{os.geteuid()}" == cache.private_directory()
    assert private.stat().st_mode & 0o777 == 0o700
    (sentence,) = said
    assert str(open_to_all) in sentence
    assert f"mode {mode:04o}" in sentence
    assert "LIGHTNING_EFF_CACHE" in sentence


def test_a_folder_of_somebody_else_is_left_for_a_private_one(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", STRANGER, -1)
    monkeypatch.setenv("LIGHTNING_EFF_CACHE", str(tmp_path / "theirs"))
    private, said = used_folder()
    assert private == cache.private_directory()
    assert f"belongs to user {STRANGER}" in said[0]


@pytest.mark.parametrize("made", ["link", "open", "file"])
def test_the_private_folder_is_checked_too(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGHTNING_EFF_CACHE", str(tmp_path / "file" / "below"))
    private = cache.private_directory()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    if made == "link":
        private.symlink_to(tmp_path / "elsewhere")
    elif made == "file":
        private.touch()
    else:
        private.mkdir()
        private.chmod(0o777)
    folder, said = used_folder()
    assert folder is None
    assert len(said) == 2
    assert "cannot be used" in said[1]
    assert str(private) in said[1]


def test_systems_without_owners_and_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "geteuid")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setenv("LIGHTNING_EFF_CACHE", str(tmp_path))
    tmp_path.chmod(0o777)  # what Windows says of every folder
    folder, said = used_folder()
    assert (folder, said) == (tmp_path, [])
    with cache.locked(folder, time.monotonic()) as held:
        assert not held
    assert cache.read_trusted(written(folder)) == DATA
    assert cache.private_directory().name == "lightning_eff-user"


# ------------------------------------------------------------------------------------------------------- folder


@pytest.mark.parametrize(
    ("mine", "shared", "expected"),
    [
        (None, None, "HOME/.cache/lightning_eff"),
        ("", "", "HOME/.cache/lightning_eff"),
        (" ", " ", "HOME/.cache/lightning_eff"),
        ("", "/some/where", "/some/where/lightning_eff"),
        (None, "~/there", "HOME/there/lightning_eff"),
        (None, "not/absolute", "HOME/.cache/lightning_eff"),
        ("/my own/[/b]", "/some/where", "/my own/[/b]"),
        ("~", None, "HOME"),
        ("~/mine", "/some/where", "HOME/mine"),
        ("here", None, "CWD/here"),
        ("~no such user/x", None, "PRIVATE"),
    ],
)
def test_the_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    temporary: Path,
    mine: str | None,
    shared: str | None,
    expected: str,
) -> None:
    for name, value in (("LIGHTNING_EFF_CACHE", mine), ("XDG_CACHE_HOME", shared)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    for word, path in (("HOME", tmp_path), ("CWD", Path.cwd()), ("PRIVATE", cache.private_directory())):
        expected = expected.replace(word, str(path))
    assert cache.cache_directory() == Path(expected)


def test_without_a_home_the_private_folder_is_used_and_said(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LIGHTNING_EFF_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(unknown))
    assert cache.cache_directory() == cache.private_directory()
    folder, said = used_folder()
    assert folder == cache.private_directory()
    assert "no home directory is known" in said[0]


def test_without_any_place_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGHTNING_EFF_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    folder, said = used_folder()
    assert folder is None
    assert len(said) == 2


# ------------------------------------------------------------------------------------------------------- writing


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
    a_full_folder(tmp_path / f"{cache.SCRATCH}of-a-killed-build")
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
