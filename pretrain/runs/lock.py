"""Locks run folders: one job at a time trains in one; the system frees a dead process's lock."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from data_pipeline.disk import open_regular
from data_pipeline.files import (
    HELD,
    NO_LOCKS,
    PATIENCE,
    alone,
    open_lock,
    refuse_run,
    sign,
    write_aside,
)
from data_pipeline.records import DataError
from pretrain.cli.console import warn
from pretrain.errors import RunError

LOCK = ".lock"


class BusyError(RunError):
    """Another process trains in this folder."""


class RunLock:
    """An advisory lock on a run folder, held by the main process of a job."""

    def __init__(self, run: Path, patience: float = PATIENCE) -> None:
        """
        Args:
            patience: seconds to wait for a command that writes other files into a new folder.
        """
        self._run, self._patience = run, patience
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock; if the file system has no locks, warn and continue without.

        Raises:
            BusyError: if another process has it, or writes other files into the new folder.
        """
        with _alone(self._run, self._patience):
            self._run.mkdir(parents=True, exist_ok=True)
            file = _open(self._run)
            try:
                # `is_busy` holds a lock for a moment, in any number of other processes.
                free = any(_try(file, fcntl.LOCK_EX, pause) for pause in (0.0, 0.05, 0.1, 0.2, 0.4))
            except OSError as error:
                _warn_no_locks(self._run, error)
                free = True
        if not free:
            holder = file.read(200).strip() or "unknown"
            file.close()
            raise BusyError(
                f"{self._run}: another process is training here ({holder}); wait for it or stop it"
            ) from None
        sign(file.fileno())
        self._file = file

    def release(self) -> None:
        """Release the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None


@contextmanager
def _alone(folder: Path, patience: float) -> Iterator[None]:
    """Keep other commands out of a folder, while the block locks it (`files.alone`).

    Raises:
        BusyError: if one still writes there after ``patience`` seconds.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(alone(folder, patience))
        except DataError as error:
            raise BusyError(str(error)) from None
        yield


@contextmanager
def shared(
    folder: Path, files: dict[Path, bytes], work: str, patience: float = PATIENCE
) -> Iterator[None]:
    """Hold a folder together with other processes of the same sweep.

    Args:
        files: files that are in the folder meanwhile; the first process writes them.
        work: the name of the work, for messages.
        patience: seconds to wait for a command that writes other files into a new folder.

    Raises:
        BusyError: if a process of other work holds the folder, or writes other files there.
    """
    with ExitStack() as stack:
        with _alone(folder, patience):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(_open(folder))
            refuse_run(folder)
            try:
                _try(file, fcntl.LOCK_SH)
            except OSError as error:
                _warn_no_locks(folder, error)
                _write_all(files)
            else:
                _join(folder, file, files, work)
        yield


def _join(folder: Path, file: IO[str], files: dict[Path, bytes], work: str) -> None:
    joined = False
    for pause in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6):
        if _try(file, fcntl.LOCK_EX, pause):  # no other process holds it
            refuse_run(folder)
            sign(file.fileno())
            _write_all(files)
        joined = _try(file, fcntl.LOCK_SH)
        if joined:
            break
    if not joined:
        raise BusyError(f"{folder}: another process is writing here; wait for it or stop it")
    for path, data in files.items():
        if not path.is_file() or path.read_bytes() != data:
            raise BusyError(
                f"{folder}: another {work} is running here, with another {path.name}; wait for "
                "it, or choose another --out"
            )


def _write_all(files: dict[Path, bytes]) -> None:
    for path, data in files.items():
        write_aside(path, data)


def _open(folder: Path) -> IO[str]:
    """The file that is locked."""
    return os.fdopen(open_lock(folder / LOCK, 0o666), "r+", encoding="utf-8")


def _warn_no_locks(folder: Path, error: OSError) -> None:
    warn(
        f"{folder}: its file system has no locks ({error.strerror}); another job in this folder "
        "would not be noticed"
    )


def is_busy(run: Path) -> bool:
    """Whether a process is training in the folder now; without locks, this is not known."""
    try:
        with open_regular(run / LOCK) as file:
            return not _try(file, fcntl.LOCK_SH)
    except OSError as error:
        if error.errno in (errno.ENOENT, *NO_LOCKS):
            return False
        raise


def holds(run: Path) -> bool | None:
    """Whether a process trains in the folder, by what the system tells: the lock is not touched.

    Returns:
        None if this is not known: the process is on another machine, or the system does not tell.
    """
    try:
        with open_regular(run / LOCK) as file:
            inode, signed = os.fstat(file.fileno()).st_ino, file.read(200)
    except OSError:
        return False
    pid, _, host = signed.decode(errors="replace").strip().removeprefix("pid ").partition(" on ")
    try:
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return None
    # "1: FLOCK ADVISORY WRITE 4711 fe:00:5276003 0 EOF"; some file systems show another device.
    held = any(len(line) > 5 and (line[4], line[5].rpartition(":")[2]) == (pid, str(inode))
               for line in lines)  # fmt: skip
    return held if held or host in ("", socket.gethostname()) else None


def _try(file: IO[Any], kind: int, pause: float = 0.0) -> bool:
    """Take a lock if it is free after a pause; closing the file releases it.

    Raises:
        OSError: if the file system has no locks.
    """
    time.sleep(pause)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        raise
    return True
