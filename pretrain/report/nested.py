"""Finds run folders in a folder, and those one level deeper, which a report does not read."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pretrain.runs.folder import CONFIG
from pretrain.runs.metrics import METRICS
from pretrain.sweep.config import by_numbers
from pretrain.sweep.run import SWEEP

_MOST_NAMED = 3
"""Number of folders that a note names."""


def run_folders(path: Path) -> list[Path]:
    """The run folders in a folder, in the order of their numbers."""
    return _in_order(folder for folder in path.iterdir() if _is_run(folder))


def deeper(path: Path) -> list[Path]:
    """The folders in a folder that are no runs, but have runs of their own."""
    if _is_run(path) or not path.is_dir():
        return []
    return _in_order(folder for folder in path.iterdir() if _has_runs(folder))


def nested(path: Path, given: Iterable[Path]) -> list[str]:
    """A note on folders of runs in a folder, which are not read.

    Args:
        given: the paths of the report; a folder that is one of them is read.
    """
    taken = {one.resolve() for one in given}
    found = [folder for folder in deeper(path) if folder.resolve() not in taken]
    if not found:
        return []
    words = (
        "a folder of runs; give it, too" if len(found) == 1 else "folders of runs; give them, too"
    )
    return [f"left out: {some(found)}: {words}"]


def some(folders: list[Path]) -> str:
    """The first of some folders, and the number of the others."""
    left = len(folders) - _MOST_NAMED
    named = ", ".join(map(str, folders[:_MOST_NAMED]))
    return f"{named} and {left} more" if left > 0 else named


def _in_order(folders: Iterable[Path]) -> list[Path]:
    return sorted(folders, key=lambda folder: by_numbers(folder.name))


def _is_run(folder: Path) -> bool:
    return folder.is_dir() and ((folder / CONFIG).exists() or (folder / METRICS).exists())


def _has_runs(folder: Path) -> bool:
    """Whether it is no run, but a sweep or a folder of runs."""
    if not folder.is_dir() or _is_run(folder):
        return False
    with suppress(OSError):  # a folder that may not be read is not searched
        return (folder / SWEEP).exists() or any(map(_is_run, folder.iterdir()))
    return False
