"""Reads row norms of the factors of the first heads from checkpoints, for a report."""

from __future__ import annotations

from pretrain.checkpoint.reader import CHECKPOINTS, Checkpoint, list_checkpoints
from pretrain.report.load import RunData

Norms = dict[str, tuple[list[float], list[float], list[str]]]
"""By product: squared norms of A's and of B's columns, and the label of each."""


def row_norms(run: RunData) -> Norms | None:
    """Squared norms per head dimension of (W_K, W_Q) and (P, W_V), first head of each layer.

    Returns:
        None without a checkpoint.
    """
    checkpoints = list_checkpoints(run.path / CHECKPOINTS)
    if not checkpoints:
        return None
    checkpoint = Checkpoint(checkpoints[-1])
    norms: Norms = {"qk": ([], [], []), "vp": ([], [], [])}
    for layer in range(checkpoint.config.model.num_layers):
        for product, (a, b) in checkpoint.attention(layer).row_norms().items():
            norms[product][0].extend(a.tolist())
            norms[product][1].extend(b.tolist())
            norms[product][2].extend(f"layer {layer} row {row}" for row in range(len(a)))
    return norms
