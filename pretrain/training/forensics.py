"""What is found out and kept about an update whose loss or gradient was not finite."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from data_pipeline.files import replacing
from pretrain.training.state import Training

KEPT = "faults"
"""Folder in a run folder with the batches of such updates."""
_MOST = 20
"""Batches that a process keeps; the numbers of their samples are always in the message."""


def find_nonfinite(training: Training, step: int) -> str:
    """Find where an update's value first was not finite, and keep its batch; a collective call.

    The forward pass is repeated on every process. Under a pipeline nothing is looked for.

    Returns:
        A text for the message, the same on every process.
    """
    if training.grid.pipeline > 1:
        return ""
    own = training.engine.first_nonfinite()
    found = training.grid.gather(own)
    places = [(place, rank) for rank, place in enumerate(found) if place is not None]
    if own is not None or (not places and training.grid.is_main):
        _keep(training, step)
    if not places:
        return "in the backward pass, or not again when the forward pass was repeated"
    first, rank = min(places)
    on = f" on process rank {rank}" if training.grid.world_size > 1 else ""
    return f"first in {first.text}{on}"


def _keep(training: Training, step: int) -> None:
    """Write the micro batches of this process's update, ``[micro batches, sequences, context]``."""
    folder = training.run / KEPT
    path = folder / f"update-{step:08d}-rank-{training.grid.rank}.npz"
    if sum(1 for _ in folder.glob(f"update-*-rank-{training.grid.rank}.npz")) >= _MOST:
        return
    inputs, labels = (
        np.stack([batch[part].cpu().numpy() for batch in training.engine.last_batches])
        for part in (0, 1)
    )
    with suppress(OSError), replacing(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, inputs=inputs, labels=labels)
