"""Retries for disks that fail briefly, atomic removal of folders, and a count of bytes moved."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
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
            if error.errno in final or isinstance(error, NotRegularError):
                raise
        time.sleep(pause)
    return action()


class NotRegularError(OSError):
    """A folder, a pipe, a socket or a device lies where a file should."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of a block that writes a file the file's name, which a full disk does not tell.

    Raises:
        OSError: that names ``path``, if it named none.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        # NumPy says "512 requested and 128 written" without a number.
        number, why = error.errno or errno.ENOSPC, error.strerror or str(error)
        raise OSError(number, why, str(path)) from None


def open_regular(path: Path, most: int | None = None) -> BinaryIO:
    """Open a file for reading; never wait for a pipe or read a device.

    Args:
        most: largest allowed number of bytes; None: any number.

    Raises:
        NotRegularError: if it is no file.
        OSError: that names the file, also if it is larger.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise NotRegularError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise NotRegularError(errno.ENXIO, "not a regular file", str(path))
        if most is not None and status.st_size > most:
            text = f"{status.st_size:,} bytes; such a file has at most {most:,}"
            raise OSError(errno.EFBIG, text, str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


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
    leftovers: list[str] = []
    with contextlib.suppress(OSError):
        for path in list(hidden.iterdir()):
            own = path.name == "manifest.json" or path.suffix == ".safetensors"
            try:
                if own:
                    path.unlink()
                else:
                    leftovers.append(path.name)
            except OSError:
                leftovers.append(".nfs")
        if not leftovers:
            hidden.rmdir()
        elif not any(name.startswith(".nfs") for name in leftovers):
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
