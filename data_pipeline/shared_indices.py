"""Large indices of training data: built by one process of a machine, mapped by the others.

The order of an epoch takes 4 bytes for every document and 12 for every sample: 6 GB for 10¹² tokens
in samples of 2,048. The first process builds and writes it; the others wait and map the same pages.
The files are gone when all processes have mapped them.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

LEAST = 256 << 20
"""Bytes from which on indices are shared."""
_KEPT = 24 * 3600.0
"""Seconds after which the files of a job that was killed are deleted."""
_COUNT, _ARRAYS = "count", "arrays"
Arrays = tuple[np.ndarray, ...]


def local_processes() -> int:
    """Number of the job's processes on this machine, as the launcher says; 1 if it does not."""
    names = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdecimal()), 1)


def shared_arrays(
    key: str, size: int, build: Callable[[], Arrays], processes: int | None = None
) -> Arrays:
    """What ``build`` returns, once for all processes of this machine.

    Each process has its own arrays if they are small, if it is alone, or if the folder of temporary
    files is full or somebody else's.

    Args:
        key: letters and digits; calls with one key build the same.
        size: about the number of bytes.
        processes: of this machine; None: as the launcher says.
    """
    count = local_processes() if processes is None else processes
    place = _own_folder() if count > 1 and size >= LEAST else None
    if place is None:
        return build()
    _delete_old(place)
    with _alone(place / f"{key}.lock"):
        folder = place / key
        if not (folder / _COUNT).exists():  # the first, or the first after one that was killed
            arrays = build()
            if not _written(folder, arrays):
                return arrays
        mapped = tuple(
            np.load(file, mmap_mode="r") for file in sorted((folder / _ARRAYS).iterdir())
        )
        seen = 1 + int((folder / _COUNT).read_text() or 0)
        (folder / _COUNT).write_text(str(seen))
        if seen >= count:
            shutil.rmtree(folder, ignore_errors=True)  # the pages stay while they are mapped
        else:
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return mapped


def _own_folder() -> Path | None:
    """A folder of temporary files that only this user can read or write."""
    folder = Path(tempfile.gettempdir()) / f"rankdecay-indices-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
    return folder if private and status.st_uid == os.getuid() else None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock; the system frees that of a dead process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _written(folder: Path, arrays: Arrays) -> bool:
    """Write arrays so that others can map them; False if the disk is full."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        (folder / _ARRAYS).mkdir(parents=True)
        for number, array in enumerate(arrays):
            np.save(folder / _ARRAYS / f"{number}.npy", array, allow_pickle=False)
        (folder / _COUNT).write_text("0")
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def _delete_old(place: Path) -> None:
    """Delete what jobs left that were killed before all processes had mapped it."""
    with contextlib.suppress(OSError):
        for entry in place.iterdir():
            if time.time() - entry.stat().st_mtime > _KEPT:
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
