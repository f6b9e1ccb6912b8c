"""A file in the cache is never trusted: whatever lies there is what was written, or it is not used."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
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
