"""Finds the stored models that a word on the command line names."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from models.hub import by_number, fetch, is_hub_name, revisions
from models.huggingface import is_pretrained
from pretrain.checkpoint.manifest import MANIFEST
from pretrain.checkpoint.reader import CHECKPOINTS, list_checkpoints
from pretrain.errors import UsageError
from pretrain.runs.folder import CONFIG, resolve_checkpoint
from pretrain.runs.unfit import why_no_checkpoint


@dataclass(frozen=True)
class Found:
    """A stored model."""

    name: str
    path: Path
    """Folder of a Hugging Face model, or of a checkpoint."""
    is_pretrained: bool
    """Whether it is in Hugging Face's format."""


def find_models(target: str) -> list[Found]:
    """The models that ``target`` names, in order of steps.

    Args:
        target: RUN, RUN@STEP, RUN@* (all its checkpoints), a checkpoint folder, a folder of a
            Hugging Face model, a folder of several of either, or a name on the Hub with @REVISION.
            A revision, and the name of a folder in a folder of several, may have a ``*``.

    Raises:
        UsageError, ModelError: one line that names what was not found.
    """
    base, _, version = target.rpartition("@") if "@" in target else (target, "", "")
    path = Path(base)
    if not path.exists() and is_hub_name(target) and not target.startswith("."):
        chosen = revisions(base, version)
        return [Found(revision or base, fetch(base, revision), True) for revision in chosen]
    if is_pretrained(path):
        return [Found(path.name or path.resolve().name, path, True)]
    if path.is_dir() and not (path / CONFIG).exists():
        inside = _inside(path, base, version)
        if inside:
            return inside
    if version == "*":
        checkpoints = list_checkpoints(path / CHECKPOINTS)
        if not checkpoints:
            raise UsageError(f"{path}: {why_no_checkpoint(path)}")
        return [_checkpoint(checkpoint) for checkpoint in checkpoints]
    if not path.exists():
        raise UsageError(f"{base}: no such folder")
    return [_checkpoint(resolve_checkpoint(target))]


def _inside(path: Path, base: str, version: str) -> list[Found]:
    """The models in a folder of several; empty if it is no such folder."""
    parts = sorted(
        (folder for folder in path.iterdir() if folder.is_dir()),
        key=lambda folder: by_number(folder.name),
    )
    models = [Found(folder.name, folder, True) for folder in parts if is_pretrained(folder)]
    if models:
        chosen = [model for model in models if fnmatch.fnmatchcase(model.name, version or "*")]
        if not chosen:
            names = ", ".join(model.name for model in models[:8])
            raise UsageError(f"{base}: no model in it matches {version}; there are {names}")
        return chosen
    if version or (path / MANIFEST).is_file():
        return []
    return [_checkpoint(checkpoint) for checkpoint in list_checkpoints(path)]


def _checkpoint(path: Path) -> Found:
    return Found(path.name, path, False)
