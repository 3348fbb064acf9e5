"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.records import DataError

LOCK = ".lock"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_ASIDE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.tmp")


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it; a link in its place is refused."""
    with os.fdopen(os.open(path, _NEW | os.O_TRUNC, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path``, which takes its place when the block ends well.

    Its name is nobody else's, and it has the mode of the file that it replaces. A block that fails
    leaves nothing; a kill leaves a file that `is_leftover` knows.

    Raises:
        OSError: that names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name[:50]}.{secrets.token_hex(6)}.tmp")
    try:
        os.close(os.open(aside, _NEW | os.O_EXCL, 0o666))
        try:
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


def write_aside(path: Path, data: bytes) -> None:
    """Write a file beside ``path`` and rename it, so that a kill leaves the old one or the new."""
    with replacing(path) as aside:
        write_synced(aside, data)


def is_leftover(name: str, *of: str) -> bool:
    """Whether a file name is what a kill during `replacing` leaves, of a file named in ``of``."""
    found = _ASIDE.fullmatch(name)
    return found is not None and found["name"] in of


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone; the system frees the lock of a dead one.

    Raises:
        DataError: if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Not through a link: it may lead to a file of somebody else.
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "unknown"
            raise DataError(
                f"{folder}: another process writes this folder ({holder}); wait for it or choose "
                "another --out"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            print(
                f"warning: {folder}: this file system has no locks; start no second process here",
                file=sys.stderr,
                flush=True,
            )
        file.seek(0)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
