"""Files that are whole or not there, and folders that one process writes."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.records import DataError

LOCK = ".lock"


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_aside(path: Path, data: bytes) -> None:
    """Write a file beside ``path`` and rename it, so that a kill leaves the old one or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    write_synced(aside, data)
    os.replace(aside, path)


@contextmanager
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
