"""Writes folders that are complete or absent: under a temporary name first, then renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.files import PATIENCE, held
from data_pipeline.records import DataError
from pretrain.cli.console import warn
from pretrain.distributed.signals import SIGNALS
from pretrain.errors import UsageError

_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


@contextmanager
def whole_folder(out: Path, verb: str, patience: float = PATIENCE) -> Iterator[Path]:
    """Make a temporary folder beside ``out``, which becomes ``out`` when the block ends.

    If several processes write one folder, the first to end keeps it; the others find it taken and
    remove only what they wrote. A killed process leaves nothing under the name of ``out``.

    Args:
        verb: the command that writes it, for the folder's name and for messages.
        patience: seconds to wait at the end for a command that writes other files into ``out``.

    Raises:
        UsageError: if ``out`` is not empty, before or after the block, or still being written.
    """
    place = out.resolve() if out.is_symlink() else out
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise _taken(out)
    place.parent.mkdir(parents=True, exist_ok=True)
    head = f".{place.name[:60]}.{verb}-"
    _tell_leftovers(place.parent, head)
    aside = place.with_name(head + secrets.token_hex(6))
    mark = None
    try:
        aside.mkdir()
        mark = _locked(aside)
        yield aside
        # Signals come too late now: a command that is done must not say "try again".
        SIGNALS.ignore()
        _rename(aside, place, out, patience)
    except BaseException:
        SIGNALS.ignore()  # a second one would interrupt the removal
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        if mark is not None:
            os.close(mark)
    _sync(place.parent)


def _rename(aside: Path, place: Path, out: Path, patience: float) -> None:
    """Give a folder its name, while no command writes other files there (`held`)."""
    try:
        with held(place, patience, warns=False):
            aside.rename(place)  # replaces an empty folder, and nothing else
    except DataError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        raise _taken(out) from None


def _taken(out: Path) -> UsageError:
    return UsageError(f"{out}: not empty; choose another --out")


def _tell_leftovers(parent: Path, head: str) -> None:
    """Report folders that a killed process left; they are not deleted automatically."""
    for folder in sorted(parent.glob(f"{head.replace('[', '[[]')}*")):
        with suppress(OSError):  # a file system without locks cannot show this
            mark = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(mark, fcntl.LOCK_SH | fcntl.LOCK_NB)
                warn(f"{folder}: was left by a killed process; delete it")
            finally:
                os.close(mark)


def _locked(folder: Path) -> int:
    """Open and lock the folder while this process lives, so that others can see it."""
    mark = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return mark


def _sync(folder: Path) -> None:
    """Write the new name to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
