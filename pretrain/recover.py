"""Which checkpoint a run goes on from, when files are damaged or gone."""

from __future__ import annotations

import os
from pathlib import Path

from pretrain.checkpoint import Checkpoint, DamagedError, list_checkpoints
from pretrain.errors import RunError
from pretrain.grid import Grid
from pretrain.mirror import Mirror
from pretrain.tracking import warn


def find_whole(folder: Path, grid: Grid, mirror: str) -> list[str]:
    """Put damaged newest checkpoints aside until the newest is whole; a collective call.

    The ranks share the reading. A damaged one is renamed ``damaged-step-…``, so that nothing takes
    it again and nothing is lost. Where none is left, the mirror's newest is fetched.

    Args:
        folder: ``RUN/checkpoints``.

    Returns:
        One line for each that was put aside or fetched.

    Raises:
        RunError: if there were checkpoints and none is whole.
    """
    told: list[str] = []
    while True:
        newest = grid.broadcast(next(iter(reversed(list_checkpoints(folder))), None))
        if newest is None:
            break
        with grid.together(""):
            mine = _problem(newest, grid)
        found = [problem for problem in grid.gather(mine) if problem]
        if not found:
            return told
        told.append(f"{found[0]}; put aside, and on from the one before")
        with grid.together(""):
            if grid.is_main:
                warn(told[-1])
                _put_aside(newest)
    if mirror:
        with grid.together(""):
            name = Mirror(mirror).pull(folder) if grid.is_main else None
        name = grid.broadcast(name)
        if name:
            return [*told, f"{name} was fetched from {mirror}"]
    if told:
        raise RunError(
            f"{folder}: no whole checkpoint is left (damaged-… are what there was); choose another "
            "--out to begin anew, or bring one back"
        )
    return told


def _problem(path: Path, grid: Grid) -> str:
    try:
        return Checkpoint(path).problem(grid.rank, grid.world_size)
    except DamagedError as error:
        return str(error)


def _put_aside(path: Path) -> None:
    target = path.with_name(f"damaged-{path.name}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"damaged-{path.name}-{number}")
    os.rename(path, target)
