"""Retries for disks that fail briefly, atomic removal of folders, and a count of bytes moved."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

Found = TypeVar("Found")

NO_SUCH = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP})
"""Errors that a working disk reports: there is no such file."""
_PAUSES = [0.1, 0.4, 1.5]
"""Seconds before each further try."""
_moved = 0
_DELETING = re.compile(r"\.{1,2}step-[0-9]{8,18}(\.writing)?\.[0-9a-f]{8}\.deleting")


def moved() -> int:
    """Bytes of checkpoints that this process has read, written and copied; it only grows."""
    return _moved


def count(size: int) -> None:
    """Count bytes that were moved: while bytes move, waiting for a disk is not a hang."""
    global _moved  # noqa: PLW0603 - the watchdog asks for the whole process
    _moved += size


def patiently(
    action: Callable[[], Found], final: frozenset[int] = NO_SUCH, pauses: list[float] | None = None
) -> Found:
    """Call an action that reads a disk, try it again if it fails, and return its result.

    Args:
        final: errors after which another try is useless.

    Raises:
        OSError: the error of the last try.
    """
    for pause in _PAUSES if pauses is None else pauses:
        try:
            return action()
        except OSError as error:
            if error.errno in final:
                raise
        time.sleep(pause)
    return action()


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; never wait for a pipe or read a device.

    Raises:
        ValueError: if it is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    return os.fdopen(descriptor, "rb")


def hide(folder: Path) -> Path:
    """Rename a folder to a name that nothing reads, so that it disappears in one operation.

    Returns:
        The argument for `remove`.
    """
    hidden = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.deleting")
    os.rename(folder, hidden)
    return hidden


def remove(hidden: Path) -> None:
    """Delete the files of a hidden checkpoint, and its folder.

    Files of somebody else in the folder are kept, and the folder gets its name back. On some
    network
    file systems, files that are still open somewhere stay hidden: `remove_hidden` tries again.
    """
    left: list[str] = []
    with contextlib.suppress(OSError):
        for path in list(hidden.iterdir()):
            own = path.name == "manifest.json" or path.suffix == ".safetensors"
            try:
                if own:
                    path.unlink()
                else:
                    left.append(path.name)
            except OSError:
                left.append(".nfs")
        if not left:
            hidden.rmdir()
        elif not any(name.startswith(".nfs") for name in left):
            os.rename(hidden, hidden.with_name(hidden.name[1:].rpartition(".")[0][:-9]))


def remove_hidden(folder: Path) -> None:
    """Delete what earlier calls of `remove` could not delete."""
    for path in list(folder.iterdir()):
        if _DELETING.fullmatch(path.name):
            remove(path)


def sync_folder(path: Path) -> None:
    """Write the names in a folder to disk, if its file system supports this."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(descriptor)
