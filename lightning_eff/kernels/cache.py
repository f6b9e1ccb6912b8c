"""Keep files on disk that are used again only after a check: compiled kernels and measured choices.

A file in the cache is never trusted. It is used only when

- it and its folder belong to this user or to root, and nobody else may write to either, and
- its content has the SHA-256 that is recorded beside it, in ``NAME.sha256`` (``sha256sum -c`` reads it).

Anything else is made anew. Files are synced and then renamed, so that a power cut leaves the old file, the new one or
one that is noticed. Processes that make the same thing take turns by a file lock, which the kernel releases when its
holder dies. A folder that cannot be used is replaced by a private one among the temporary files, checked the same way.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

LARGEST_BYTES = 64 * 2**20
"""More than this is nothing of ours; it is not read."""
SCRATCH = "kernels-scratch-"
"""How the names of unfinished files and folders begin; the next process that holds the lock removes them."""
LOCK = "kernels.lock"
_ROOM_BYTES = 8 * 2**20
_POLL_S = 0.05
_T = TypeVar("_T")


class UntrustedError(OSError):
    """A file or folder does not fulfil what the module promises; the message is one for people."""


def cache_directory() -> Path:
    """Return ``$LIGHTNING_EFF_CACHE``, else the folder ``lightning_eff`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    An empty variable counts as unset, ``~`` is expanded, a relative ``XDG_CACHE_HOME`` is ignored (as its specification
    wants), a relative ``LIGHTNING_EFF_CACHE`` starts from the working folder. Without a home: the private folder.
    """
    try:
        return _asked_directory()
    except OSError:
        return private_directory()


def _asked_directory() -> Path:
    try:
        if mine := os.environ.get("LIGHTNING_EFF_CACHE", "").strip():
            return Path(mine).expanduser().absolute()
        shared = Path(os.environ.get("XDG_CACHE_HOME", "").strip()).expanduser()
        return (shared if shared.is_absolute() else Path.home().absolute() / ".cache") / "lightning_eff"
    except RuntimeError as error:  # a user without an entry in the password file, ~name of nobody
        raise UntrustedError(f"no home directory is known ({error}); LIGHTNING_EFF_CACHE names a folder") from error


def private_directory() -> Path:
    """Return the folder used where the one asked for cannot be: among the temporary files, of this user alone."""
    user = os.geteuid() if hasattr(os, "geteuid") else "user"
    return Path(tempfile.gettempdir()).absolute() / f"lightning_eff-{user}"


def in_usable_folder(work: Callable[[Path], _T], said: list[str]) -> _T | None:
    """Do ``work`` in the folder asked for, or in the private one if that does not go.

    Args:
        work: takes the folder. An OSError from it means that the folder cannot be used, except a TimeoutError.
        said: gets one sentence for people per folder that was not used.

    Returns:
        What ``work`` returned; ``None`` if no folder could be used.

    Raises:
        TimeoutError: ``work`` waited too long for another process.
    """
    for find, mode in ((_asked_directory, 0o755), (private_directory, 0o700)):
        where = "The kernel cache"
        try:
            folder = find()
            where = f"The folder {folder}"
            _open_folder(folder, mode)
            return work(folder)
        except TimeoutError:
            raise
        except OSError as error:
            said.append(f"{where} cannot be used: {error}.")
    return None


def _open_folder(folder: Path, mode: int) -> None:
    """Make the folder unless it is there; an UntrustedError if others could put something into it."""
    folder.mkdir(mode=mode, parents=True, exist_ok=True)
    # Others may put a link where the private folder is to be; in a home a link is the user's own.
    private = mode == 0o700
    status = folder.lstat() if private else folder.stat()
    if private and not stat.S_ISDIR(status.st_mode):
        raise UntrustedError("it is a link; remove it, or let LIGHTNING_EFF_CACHE name a folder of yours")
    if flaw := _flaw(status):
        raise UntrustedError(
            f"{flaw}; take it for yourself (chown, chmod go-w), or let LIGHTNING_EFF_CACHE name another"
        )


def _flaw(status: os.stat_result) -> str:
    """Why something is not trusted for its owner or its mode; empty if it is, and where there are no such owners."""
    if not hasattr(os, "geteuid"):
        return ""
    if status.st_uid not in (0, os.geteuid()):
        return f"it belongs to user {status.st_uid}, not to {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to it (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def read_trusted(path: Path) -> bytes:
    """Return the content of a file that fulfils the promises above; its folder has been checked.

    Raises:
        FileNotFoundError: there is no such file.
        UntrustedError: it is not to be used; the message says why and what to delete.
        OSError: it cannot be read.
    """
    data, beside = _read(path), _hash_file(path)
    try:
        recorded = _read(beside)[:64]
    except FileNotFoundError as error:
        raise UntrustedError(f"{path} has no hash beside it and was not used; delete it") from error
    if hashlib.sha256(data).hexdigest().encode() != recorded:
        raise UntrustedError(f"{path} is damaged, its SHA-256 is not the one in {beside.name}; delete it")
    return data


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _read(path: Path) -> bytes:
    """The bytes of a regular file of trusted owner, mode and size, all taken from one open file."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(descriptor)
        kind = "" if stat.S_ISREG(status.st_mode) else "it is not a file"
        size = "" if status.st_size <= LARGEST_BYTES else f"it has {status.st_size} bytes"
        if flaw := kind or _flaw(status) or size:
            raise UntrustedError(f"{path} was not used: {flaw}; delete it")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(LARGEST_BYTES)
    finally:
        os.close(descriptor)


def write_trusted(path: Path, data: bytes) -> None:
    """Put a file and its hash in place of whatever is there, so that a power cut leaves nothing that would be used.

    Raises:
        OSError: the disk is full, the folder is read-only.
    """
    beside = _hash_file(path)
    _replace(path, data)
    _replace(beside, f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())
    with contextlib.suppress(OSError):  # some file systems cannot sync folders; a lost rename is noticed by the hash
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _replace(path: Path, data: bytes) -> None:
    scratch = path.with_name(SCRATCH + secrets.token_hex(8))
    try:
        scratch.touch(0o644, exist_ok=False)  # never more than that: with umask 002 others could write to it
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Make a folder for unfinished files with room for a build; it is removed at the end.

    Raises:
        OSError: the disk or the quota is full, the folder is read-only.
    """
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder, ignore_cleanup_errors=True) as name:
        room = Path(name) / "room"  # a compiler that runs out of it says so in its own words only
        room.write_bytes(bytes(_ROOM_BYTES))
        room.unlink()
        yield Path(name)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left unfinished. The caller holds the lock: nobody else is at work."""
    for path in folder.glob(f"{SCRATCH}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # an orphaned compiler may still write there; the next build tries
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, until: float) -> Iterator[bool]:
    """Hold the folder's lock; the value says whether this system has locks.

    Args:
        folder: a checked folder; the file ``kernels.lock`` in it stays.
        until: moment of ``time.monotonic`` at which waiting ends.

    Raises:
        TimeoutError: another process still held it then.
        OSError: the folder is read-only.
    """
    try:
        import fcntl
    except ImportError:  # Windows: the rename alone keeps processes apart
        yield False
        return
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        held = _wait_for_lock(descriptor, folder, until)
        try:
            yield held
        finally:
            if held:  # a child forked meanwhile has the descriptor, too: closing it here would not be enough
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, folder: Path, until: float) -> bool:
    import fcntl

    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return False  # a file system without locks (some Lustre, NFS)
        if time.monotonic() >= until:
            raise TimeoutError(f"another process has held {folder / LOCK} for too long; end it, or delete the folder")
        time.sleep(_POLL_S)
