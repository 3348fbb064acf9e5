"""Finds the checkpoint to continue from when files are damaged, missing, or from another run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from pretrain.checkpoint.manifest import MANIFEST, DamagedError, read_manifest
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.reader import (
    Checkpoint,
    is_checkpoint_name,
    named_so,
    names_in,
    run_id_of,
    stranger,
)
from pretrain.cli.console import warn
from pretrain.distributed.grid import Grid
from pretrain.errors import RunError

Misfit = Callable[[Checkpoint], str]
"""Says why a checkpoint does not fit the recipe; empty if it does."""


def find_whole(
    folder: Path, grid: Grid, mirror: str = "", misfit: Misfit | None = None
) -> list[str]:
    """Rename damaged newest checkpoints until the newest one is complete; a collective call.

    The processes divide the reading. A damaged checkpoint is renamed to ``damaged-step-…``, so that
    nothing uses it again and nothing is lost. Files of a person or of another run are left alone
    and named. If no checkpoint is left, the mirror's newest one that fits the recipe is fetched.

    Args:
        folder: ``RUN/checkpoints``.
        misfit: says why a checkpoint of the mirror does not belong to this run.

    Returns:
        One line for each checkpoint that was renamed, left alone or fetched.

    Raises:
        RunError: if there were checkpoints and none is complete, or if a disk does not respond; in
            the latter case nothing was renamed.
    """
    reports: list[str] = []
    with grid.together(""):
        if grid.is_main:
            reports = [line for line in [_left_alone(folder)] if line]
            for line in reports:
                warn(line)
    reports = grid.broadcast(reports)
    damaged = 0
    while True:
        newest, problem = None, ""
        with grid.together(""):
            if grid.is_main:
                newest, problem = _newest(folder)
        newest, problem = grid.broadcast((newest, problem))
        if newest is None:
            break
        own_problem = ""
        with grid.together(""):
            own_problem = problem or _problem(newest, grid)
        problems = [reason for reason in grid.gather(own_problem) if reason]
        if not problems:
            return reports
        damaged += 1
        reports.append(f"{problems[0]}; renamed, and continuing from the one before")
        with grid.together(""):
            if grid.is_main:
                warn(reports[-1])
                _put_aside(newest)
    if mirror and misfit:
        lines: list[str] = []
        with grid.together(""):
            if grid.is_main:
                lines = Mirror(mirror, folder.parent).pull(misfit)
                for line in lines:
                    warn(line)
        lines = grid.broadcast(lines)
        if grid.broadcast(bool(_own(folder)) if grid.is_main else None):
            return [*reports, *lines]
        reports += lines
    if damaged:
        raise RunError(
            f"{folder}: no complete checkpoint is left (the others were renamed damaged-…); choose "
            "another --out to start from the beginning, or restore one from a copy"
        )
    return reports


def _own(folder: Path) -> list[Path]:
    """Checkpoints of the run, complete or damaged, oldest first."""
    run = run_id_of(folder.parent)
    return [path for path in named_so(folder) if not stranger(path, run) or is_damaged(path)]


_PIECE = re.compile(r"rank-\d{5}\.safetensors")


def is_damaged(path: Path) -> bool:
    """Whether a path with a checkpoint's name is a checkpoint whose manifest is missing or wrong.

    If the manifest is unchanged but for another step or run, the path is somebody's copy.
    """
    if path.is_symlink() or not path.is_dir():
        return False
    if not (path / MANIFEST).exists():
        # A run moves complete folders into place; with anything else in it, a folder is somebody
        # else's.
        names = names_in(path)
        return bool(names) and all(name == MANIFEST or _PIECE.fullmatch(name) for name in names)
    try:
        read_manifest(path)
    except DamagedError:
        return True
    return False


def _left_alone(folder: Path) -> str:
    """One line about paths that look like checkpoints but are not of this run; empty if none."""
    run = run_id_of(folder.parent)
    why: dict[str, str] = {}
    for name in names_in(folder):
        if is_checkpoint_name(name):
            reason = stranger(folder / name, run)
            if reason and not is_damaged(folder / name):
                why[name] = reason
        elif name.startswith("step-"):
            why[name] = "is not a checkpoint's name"
    if not why:
        return ""
    shown = ", ".join(f"{name} ({reason})" for name, reason in list(why.items())[:4])
    rest = f" and {len(why) - 4} more" if len(why) > 4 else ""
    return f"{folder}: left alone, not checkpoints of this run: {shown}{rest}"


def _newest(folder: Path) -> tuple[Path | None, str]:
    """The newest checkpoint of the run, and what is wrong with its manifest."""
    checkpoints = _own(folder)
    if not checkpoints:
        return None, ""
    newest = checkpoints[-1]
    missing = not (newest / MANIFEST).exists()
    return newest, f"{newest}: damaged (its {MANIFEST} is missing)" if missing else ""


def _problem(path: Path, grid: Grid) -> str:
    try:
        return Checkpoint(path).problem(grid.rank, grid.world_size)
    except DamagedError as error:
        return str(error)


def _put_aside(path: Path) -> None:
    target = path.with_name(f"damaged-{path.name}")
    number = 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"damaged-{path.name}-{number}")
    os.rename(path, target)
