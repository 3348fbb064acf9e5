"""Finds the data of a run that was moved together with it, or is used from another folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_pipeline.manifest import load_manifest
from data_pipeline.records import DataError
from pretrain.checkpoint.reader import Checkpoint
from pretrain.config.recipe import Config
from pretrain.tasks.text import Text

_LEVELS = 4
"""How many folders above the run, and how many last parts of the data's path, are tried."""


def data_of(checkpoint: Checkpoint, config: Config) -> Path:
    """The tokenised folder of a recipe: at its path, or at the end of it beside the run.

    Only a folder with the tokens of the checkpoint is taken from elsewhere.
    """
    path = Path(config.data.path)
    if not config.data.path or path.exists() or config.data.path != checkpoint.config.data.path:
        return path
    return next((place for place in _places(path, checkpoint) if _is_of(place, checkpoint)), path)


def _places(path: Path, checkpoint: Checkpoint) -> Iterator[Path]:
    tails = [Path(*path.parts[-count:]) for count in range(min(_LEVELS, len(path.parts)), 0, -1)]
    for folder in list(checkpoint.path.resolve().parents)[: _LEVELS + 2]:
        yield from (folder / tail for tail in tails if not tail.is_absolute())


def _is_of(place: Path, checkpoint: Checkpoint) -> bool:
    try:
        task = Text(load_manifest(place))
    except (OSError, ValueError, DataError):
        return False
    state = checkpoint.state
    return (task.tokenizer, task.identity) == (state["tokenizer"], state["data"])
