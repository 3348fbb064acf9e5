"""Folders that are whole or not there: written beside their place, moved into it last."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pretrain.console import warn
from pretrain.errors import UsageError

_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


@contextmanager
def whole_folder(out: Path, verb: str) -> Iterator[Path]:
    """A folder of this process's own beside ``out``, which becomes ``out`` when the block ends.

    Of several processes that write one folder, the first to end has it; the others find it taken
    and remove only what they wrote. A kill leaves nothing under the name of ``out``.

    Args:
        verb: what writes it, for the name of the folder and for messages.

    Raises:
        UsageError: if ``out`` is not empty, before or after the block.
    """
    place = out.resolve() if out.is_symlink() else out
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise _taken(out)
    place.parent.mkdir(parents=True, exist_ok=True)
    head = f".{place.name[:60]}.{verb}-"
    _tell_leftovers(place.parent, head)
    aside = place.with_name(head + secrets.token_hex(6))
    aside.mkdir()
    mark = _locked(aside)
    try:
        yield aside
        try:
            aside.rename(place)  # takes the place of an empty folder, of nothing else
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            raise _taken(out) from None
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        os.close(mark)
    _sync(place.parent)


def _taken(out: Path) -> UsageError:
    return UsageError(f"{out}: not empty; choose another --out")


def _tell_leftovers(parent: Path, head: str) -> None:
    """Name what a killed process left; it is not ours to delete."""
    for one in sorted(parent.glob(f"{head.replace('[', '[[]')}*")):
        with suppress(OSError):  # a file system without locks cannot say
            mark = os.open(one, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(mark, fcntl.LOCK_SH | fcntl.LOCK_NB)
                warn(f"{one}: was left by a process that was killed; delete it")
            finally:
                os.close(mark)


def _locked(folder: Path) -> int:
    """The folder itself, open and locked while this process lives, so that others can tell."""
    mark = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return mark


def _sync(folder: Path) -> None:
    """Make the disk remember the new name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
