"""What a report reads from checkpoints: row norms of the factors of the first heads."""

from __future__ import annotations

from pretrain.checkpoint import Checkpoint, list_checkpoints
from pretrain.report.load import RunData
from pretrain.run import CHECKPOINTS

Norms = dict[str, tuple[list[float], list[float], list[str]]]
"""By product: squared norms of A's and of B's columns, and what each is."""


def row_norms(run: RunData) -> Norms | None:
    """Squared norms per head dimension of (W_K, W_Q) and (P, W_V), first head of each layer.

    Returns:
        None without a checkpoint.
    """
    found = list_checkpoints(run.path / CHECKPOINTS)
    if not found:
        return None
    checkpoint, model = Checkpoint(found[-1]), run.config.model
    head = model.head_size
    group = model.num_attention_heads // model.key_value_heads
    norms: Norms = {"qk": ([], [], []), "vp": ([], [], [])}
    for layer in range(model.num_layers):
        name = f"blocks.{layer}.attention.{{}}.weight"
        query, key, value, output = (
            checkpoint.full(name.format(part)) for part in ("query", "key", "value", "output")
        )
        parts = {
            "qk": (
                key[:head].square().sum(1),
                query[: group * head].view(group, head, -1).square().sum((0, 2)),
            ),
            "vp": (
                output[:, : group * head].view(-1, group, head).square().sum((0, 1)),
                value[:head].square().sum(1),
            ),
        }
        for product, (a, b) in parts.items():
            norms[product][0].extend(a.tolist())
            norms[product][1].extend(b.tolist())
            norms[product][2].extend(f"layer {layer} row {row}" for row in range(head))
    return norms
