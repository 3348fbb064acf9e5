"""Decides which checkpoints of a run are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from data_pipeline.disk import patiently
from data_pipeline.files import read_small
from pretrain.checkpoint.manifest import MANIFEST, unreadable
from pretrain.checkpoint.reader import step_of
from pretrain.config.run import CheckpointConfig

HELD_OUT_LOSS = "held_out_loss"
"""Key of a checkpoint's state: the loss by which the best one is kept."""


def held_out_loss(path: Path) -> float | None:
    """The held-out loss in a checkpoint on disk; None if it has none or is damaged.

    Raises:
        UnreadableError: if the disk does not respond, since the best is then not known.
    """
    try:
        text = patiently(lambda: read_small(path / MANIFEST))
    except OSError as error:
        raise unreadable(path / MANIFEST, error) from None
    return loss_in(text)


def loss_in(manifest: bytes) -> float | None:
    """The held-out loss in the text of a manifest, or None."""
    try:
        loss: float | None = json.loads(manifest)["state"].get(HELD_OUT_LOSS)
        return loss
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def superseded(
    checkpoints: list[Path],
    settings: CheckpointConfig,
    loss_of: Callable[[Path], float | None] = held_out_loss,
) -> list[Path]:
    """The complete checkpoints that the recipe's rules do not keep, oldest first.

    Args:
        loss_of: returns the held-out loss in a checkpoint, or None.
    """
    if not settings.keep:
        return []
    kept = set(checkpoints[-settings.keep :])
    if settings.keep_every:
        kept |= {path for path in checkpoints if step_of(path) % settings.keep_every == 0}
    if settings.keep_best and len(kept) < len(checkpoints):
        losses = [(loss, path) for path in checkpoints if (loss := loss_of(path)) is not None]
        if losses:
            kept.add(min(losses)[1])
    return [path for path in checkpoints if path not in kept]


def why_missing(step: int, every: int, keep: int) -> str:
    """Why a run that trained on has no checkpoint of a step, in brackets; empty if unknown.

    Args:
        every: steps between checkpoints.
        keep: the number of last ones that are kept; 0: all.
    """
    if step % every:
        return f" (checkpoint.every: it saves every {every} steps)"
    if not keep:
        return ""
    return (
        f" (checkpoint.keep: older ones than the last {keep} are deleted; 0 keeps all, "
        "checkpoint.keep_every some)"
    )
