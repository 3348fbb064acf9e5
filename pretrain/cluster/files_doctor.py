"""The doctor's checks of files: how many a process may open, and what the run folder's disk can do.

A run needs renames that replace and that every process sees, appends that add, and locks that keep
a second job out. Network and object file systems lack one or the other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.files import HELD, NO_LOCKS
from pretrain.distributed.grid import Grid

_USUAL = 4096
"""Open files below which a larger job or data set can run out of them."""
_OWN, _PER_RANK = 128, 8
"""Files that a process opens by itself, and for each process that it is connected to."""
_SEEN_WITHIN = 5.0
"""Seconds until which another process must see a rename; caches of NFS show it later."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    state: str
    """ok, warn or fail"""
    text: str


def open_files(grid: Grid) -> Finding:
    """Whether the limits of open files are enough on every process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = grid.gather((socket.gethostname(), soft, hard))
    host, soft, hard = min(limits, key=lambda limit: limit[1])
    needed = _OWN + _PER_RANK * grid.world_size
    mend = f"ulimit -n {max(hard, needed) if hard < 65_536 else 65_536}"
    if needed > hard:
        mend = f"ask for a hard limit of {needed} (limits.conf, or LimitNOFILE of the service)"
    if soft < needed:
        text = f"{host}: {soft} files may be open, and a process here needs {needed}: {mend}"
        return Finding("open files", "fail", text)
    if soft < _USUAL:
        text = f"{host}: only {soft} files may be open; before a large job: {mend}"
        return Finding("open files", "warn", text)
    return Finding("open files", "ok", f"at least {soft} on every process")


def file_system(grid: Grid, folder: Path, token: str) -> list[Finding]:
    """What the file system of a folder can do; nothing is left in it.

    Args:
        folder: exists on the main process.
        token: the same on all processes, for the name of a folder of this check alone.
    """
    place = folder / f".doctor-{token}.files"
    try:
        return [
            _on_main(grid, "append", lambda: _appends(place)),
            _renames(grid, place),
            _on_main(grid, "folders", lambda: _moves_folders(place)),
            _locks(grid, place),
        ]
    finally:
        grid.barrier()
        if grid.is_main:
            shutil.rmtree(place, ignore_errors=True)


def _on_main(grid: Grid, check: str, look: Callable[[], str]) -> Finding:
    """A check that one process makes.

    Args:
        look: returns what is wrong, or an empty text.
    """
    problem = ""
    if grid.is_main:
        try:
            problem = look()
        except OSError as error:
            problem = error.strerror or str(error)
    problem = grid.broadcast(problem)
    if problem:
        return Finding(check, "fail", f"{problem}; write the run to another file system (--out)")
    return Finding(check, "ok", {"append": "adds to a file", "folders": "are renamed"}[check])


def _appends(place: Path) -> str:
    """Metrics are appended to a file, which is also cut when a run goes back."""
    place.mkdir(exist_ok=True)
    file = place / "append"
    for text in ("one\n", "two\n"):
        with file.open("a") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    if file.read_text() != "one\ntwo\n":
        return "appending to a file loses what was in it"
    os.truncate(file, 4)
    return "" if file.read_text() == "one\n" else "a file cannot be cut"


def _moves_folders(place: Path) -> str:
    """A checkpoint is a folder that gets its name when it is complete."""
    (place / "new").mkdir(parents=True)
    (place / "new/file").write_text("x")
    (place / "new").rename(place / "named")
    with contextlib.suppress(FileNotFoundError):
        (place / "new/file").read_text()
        return "a renamed folder still has its old name"
    return "" if (place / "named/file").read_text() == "x" else "a renamed folder lost a file"


def _renames(grid: Grid, place: Path) -> Finding:
    """A file that replaces another one must have the new contents for every process."""
    file, problem = place / "replaced", ""
    if grid.is_main:
        try:
            place.mkdir(exist_ok=True)
            file.write_text("old")
        except OSError as error:
            problem = error.strerror or str(error)
    problem = grid.broadcast(problem)
    _read(file)  # so that a cache of this machine has it
    grid.barrier()
    if grid.is_main and not problem:
        try:
            (place / "aside").write_text("new")
            (place / "aside").replace(file)
        except OSError as error:
            problem = error.strerror or str(error)
    problem = grid.broadcast(problem)
    began = time.monotonic()
    while not problem and _read(file) != "new" and time.monotonic() - began < _SEEN_WITHIN:
        time.sleep(0.05)
    waited = grid.gather((time.monotonic() - began, _read(file)))
    if problem:
        text = f"a file cannot replace another one: {problem}"
        return Finding("rename", "fail", f"{text}; write the run to another file system (--out)")
    late = [rank for rank, (_, text) in enumerate(waited) if text != "new"]
    if late:
        text = (
            f"after {_SEEN_WITHIN:.0f} s process ranks {late[:8]} still read the file that was "
            "replaced: mount the folder with shorter caches (NFS: actimeo=1, lookupcache=positive)"
        )
        return Finding("rename", "fail", text)
    slowest = max(seconds for seconds, _ in waited)
    if slowest > 1:
        text = f"seen by all only after {slowest:.1f} s: shorten the caches of NFS (actimeo=1)"
        return Finding("rename", "warn", text)
    return Finding("rename", "ok", "replaces a file, and every process sees it")


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _locks(grid: Grid, place: Path) -> Finding:
    """A lock of the main process must keep out every other one, and be free afterwards."""
    file = place / "lock"
    with contextlib.ExitStack() as held:
        problem = ""
        if grid.is_main:
            try:
                place.mkdir(exist_ok=True)
                stream = held.enter_context(file.open("a"))
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                none = error.errno in NO_LOCKS
                problem = "has no locks" if none else f"gives no lock: {error.strerror}"
        problem = grid.broadcast(problem)
        entered = grid.gather(not problem and _takes(file))
    mend = "mount it with locks (Lustre: -o flock; NFS: version 4), or never start a run twice"
    if problem:
        return Finding("locks", "warn", f"the file system {problem}: {mend}")
    grid.barrier()
    through = [rank for rank, taken in enumerate(entered) if taken]
    if through:
        text = f"process ranks {through[:8]} took a lock that process rank 0 holds: {mend}"
        return Finding("locks", "warn", text)
    stuck = grid.broadcast(grid.is_main and not _takes(file))
    if stuck:
        return Finding("locks", "fail", f"a lock that was given back is still held: {mend}")
    return Finding("locks", "ok", "keep other processes out")


def _takes(file: Path) -> bool:
    """Whether this process gets the lock, through a descriptor of its own."""
    try:
        with file.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError as error:
        return error.errno not in (*HELD, errno.ENOENT)
