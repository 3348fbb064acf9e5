"""Reads and writes files so that a file is either complete or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.disk import naming, open_regular
from data_pipeline.records import ChoiceError, DataError

LOCK = ".lock"


class HeldError(DataError):
    """Another process writes this file or folder now."""


LARGEST = 1 << 25
"""Largest file that is read whole into Python objects, which take some twenty times its bytes."""
_LARGEST_TOKENIZER = 1 << 28
PATIENCE = 10.0
"""Seconds to wait for a command that writes other files into a new folder."""
HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})
"""Errors of a file system with locks that mean: another process has this one."""
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
"""Errors of a file system without locks."""
_NEW = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_ASIDE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.tmp")


def read_small(path: Path, most: int = LARGEST) -> bytes:
    """The bytes of a file that should be small, whatever is in its place.

    Raises:
        OSError: as `open_regular`.
    """
    with open_regular(path, most) as file:
        return file.read(most)


def read_tokenizer(path: Path) -> bytes:
    """The bytes of a tokenizer's file.

    Raises:
        DataError: if there is none, or it is larger than any tokenizer.
    """
    try:
        return read_small(path, _LARGEST_TOKENIZER)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: Path, most: int = LARGEST) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: as `open_regular`.
        ValueError: if it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(read_small(path, most))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on disk; a link in its place is refused."""
    with naming(path), os.fdopen(os.open(path, _NEW | os.O_TRUNC, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Open a temporary file beside ``path``, which replaces ``path`` when the block succeeds.

    The name is unique, and the file has the mode of the one that it replaces. A block that fails
    leaves nothing; a killed process leaves a file that `is_leftover` recognises.

    Raises:
        OSError: that names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_stream(path):
        raise OSError(errno.ENXIO, "not a regular file", str(path))
    aside = path.with_name(f".{path.name[:50]}.{secrets.token_hex(6)}.tmp")
    try:
        try:
            os.close(os.open(aside, _NEW | os.O_EXCL, 0o666))  # a signal may come as it returns
            with contextlib.suppress(FileNotFoundError):
                before = os.lstat(path)
                if stat.S_ISREG(before.st_mode):
                    aside.chmod(stat.S_IMODE(before.st_mode))
            yield aside
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise
    except OSError as error:
        if error.filename not in (None, str(aside)):
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from None


def _is_stream(path: Path) -> bool:
    """Whether a path leads to a device, a pipe or an open file: /dev/stdout, /dev/null."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        # A link that leads nowhere, or to itself, is replaced as any other.
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return False
        raise
    is_open_file = path.is_symlink() and str(path.readlink()).startswith("/proc/")
    return is_open_file or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def write_aside(path: Path, data: bytes) -> None:
    """Write a file beside ``path`` and rename it, so that a kill leaves either the old or the
    new."""
    with replacing(path) as aside:
        write_synced(aside, data)


def is_leftover(name: str, *of: str) -> bool:
    """Whether a file name was left by a kill during `replacing`, for a file named in ``of``."""
    match = _ASIDE.fullmatch(name)
    return match is not None and match["name"] in of


@contextlib.contextmanager
def locked(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Lock a folder for this process; the system frees the lock of a dead process.

    Args:
        patience: seconds to wait for a command that writes other files into a new folder.

    Raises:
        DataError: if another process holds the lock, or the folder is a run folder.
    """
    with alone(folder, patience):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = open_lock(folder / LOCK)
        try:
            _take(descriptor, folder)
        except BaseException:
            os.close(descriptor)
            raise
    try:
        refuse_run(folder)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(folder: Path, patience: float) -> Iterator[None]:
    """Keep commands that write other files (`held`) out of a folder, while the block locks it.

    Commands that come later see the lock in the folder (`refuse_busy`). They refuse a run folder
    anyway, so nothing is done for one.

    Raises:
        DataError: if such a command still writes there after ``patience`` seconds.
    """
    with contextlib.ExitStack() as stack:
        if not (folder / "run-id").exists():
            try:
                stack.enter_context(held(folder, patience, warns=False))
            except OSError as error:  # nobody else can write beside it either
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
        yield


@contextlib.contextmanager
def held(path: Path, patience: float = 0.0, warns: bool = True) -> Iterator[None]:
    """Lock the name of a file or folder for this process.

    Until the block ends, ``.NAME.lock`` is beside it; then the lock file is removed, and only the
    result is left.

    Args:
        patience: seconds to wait for another process that holds the lock.
        warns: whether to warn if the file system has no locks; the block runs in any case.

    Raises:
        DataError: if another process still holds it.
        OSError: that names ``path``.
    """
    place = _place_of(path)
    lock = place.parent / f".{place.name[:50]}.lock"
    until = time.monotonic() + patience
    place.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            descriptor = open_lock(lock)
        except OSError as error:
            raise type(error)(error.errno, error.strerror, str(path)) from None
        try:
            _take(descriptor, path, until - time.monotonic(), warns)
        except BaseException:
            os.close(descriptor)
            raise
        if _is_named(descriptor, lock):
            break
        os.close(descriptor)  # the previous holder has removed this file in the meantime
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def _place_of(path: Path) -> Path:
    """The absolute path whose name is locked: of a folder one name, whatever links lead to it.

    A link to a file keeps its own name, since writing replaces the link.
    """
    named = path.name not in ("", "..")
    place = path.parent.resolve() / path.name if named else path.resolve()
    if place.is_symlink() and place.is_dir():
        target = place.resolve()
        if os.access(target.parent, os.W_OK):  # else it is the root of a volume
            return target
    return place


def refuse_run(folder: Path) -> None:
    """Refuse to write other files into a run folder.

    Raises:
        DataError: if the folder is a run folder.
    """
    if any((folder / name).exists() for name in ("run-id", "checkpoints")):
        raise ChoiceError(f"{folder}: is a run folder; choose another --out")


def refuse_busy(folder: Path) -> None:
    """Refuse a folder in which another process trains, even if it contains only a lock yet.

    Raises:
        DataError: if another process holds the lock in the folder exclusively.
    """
    with contextlib.suppress(FileNotFoundError), open_regular(folder / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                raise HeldError(
                    f"{folder}: another process is writing here; wait for it or choose another "
                    "--out"
                ) from None


def open_lock(path: Path, mode: int = 0o644) -> int:
    """The file that is locked, made if there is none; not through a link to somebody else's.

    Raises:
        OSError: that names the file, also if a link, a pipe or a device lies in its place.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ENXIO, "a link, not a regular file", str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, "not a regular file", str(path))
    return descriptor


def _take(descriptor: int, path: Path, patience: float = 0.0, warns: bool = True) -> None:
    """Lock an open file and write the holder's name into it.

    Raises:
        DataError: if another process still has the lock after ``patience`` seconds.
    """
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in NO_LOCKS:
                if warns:
                    print(
                        f"warning: {path}: this file system has no locks; do not start a second "
                        "process here",
                        file=sys.stderr,
                        flush=True,
                    )
                break
            if error.errno not in HELD:
                raise
            if time.monotonic() > until:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                kind = "folder" if path.is_dir() else "file"
                raise HeldError(
                    f"{path}: another process is writing this {kind} ({holder or 'unknown'}); wait "
                    "for it or choose another --out"
                ) from None
            time.sleep(0.05)
    sign(descriptor)


def sign(descriptor: int) -> None:
    """Write into a lock's file who holds it; on a full disk the lock holds without a name."""
    with contextlib.suppress(OSError):
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False
