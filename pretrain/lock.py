"""One process (group) at a time trains in a run folder; the system frees the lock of a dead one."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from pretrain.errors import RunError

LOCK = ".lock"


class BusyError(RunError):
    """Another process trains in this folder."""


class RunLock:
    """An advisory lock on a run folder, held by the main process of a job."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            BusyError: if another process has it.
        """
        self._run.mkdir(parents=True, exist_ok=True)
        file = (self._run / LOCK).open("a+", encoding="utf-8")
        # `is_busy` holds a lock for a moment, in any number of other processes.
        if not any(_try(file, fcntl.LOCK_EX, pause) for pause in (0.0, 0.05, 0.1, 0.2, 0.4)):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise BusyError(
                f"{self._run}: another process is training here ({holder}); wait for it or stop it"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file

    def release(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            self._file.close()
            self._file = None


def is_busy(run: Path) -> bool:
    """Whether a process trains in the folder now."""
    try:
        with (run / LOCK).open(encoding="utf-8") as file:
            return not _try(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _try(file: IO[str], kind: int, pause: float = 0.0) -> bool:
    """Take a lock if it is free after a pause; it goes when the file is closed."""
    time.sleep(pause)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
