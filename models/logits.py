"""The largest attention logit of a layer: what weight decay of queries and keys moves directly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.documents import same_document
from models.gpt import attention_layers

_QUERIES = 256
"""Queries whose logits are computed at a time."""


@torch.no_grad()
def largest_logit(q: Tensor, k: Tensor, causal: bool, starts: Tensor | None = None) -> Tensor:
    """The largest q·k/√head of a query and a key that it sees.

    Args:
        q, k: ``[batch, heads, sequence, head]``.
        starts: of documents, ``[batch, sequence]``, if attention stays inside them.

    Returns:
        A float32 scalar on their device.
    """
    length, width = q.shape[-2:]
    largest = q.new_full((), float("-inf"), dtype=torch.float32)
    seen = None if starts is None else same_document(starts, causal)
    for begin in range(0, length, _QUERIES):
        end = min(begin + _QUERIES, length)
        keys = k[..., :end, :] if causal else k
        logits = (q[..., begin:end, :] @ keys.mT).float() * width**-0.5
        if seen is not None:
            hidden = ~seen[..., begin:end, : keys.shape[-2]]
        else:
            places = torch.arange(keys.shape[-2], device=q.device)
            hidden = (places > places[begin:end].unsqueeze(1)) & causal
        largest = torch.maximum(largest, logits.masked_fill(hidden, float("-inf")).max())
    return largest


@contextmanager
def watched_logits(module: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Record the largest logit of each attention layer during forward passes in a block.

    Yields:
        The largest so far, by layer.
    """
    found: dict[int, Tensor] = {}
    layers = attention_layers(module)
    for attention in layers:

        def look(
            q: Tensor, k: Tensor, starts: Tensor | None,
            layer: int = attention.layer, causal: bool = attention.config.causal,
        ) -> None:  # fmt: skip
            largest = largest_logit(q, k, causal, starts)
            found[layer] = torch.maximum(found[layer], largest) if layer in found else largest

        attention.watch = look
    try:
        yield found
    finally:
        for attention in layers:
            attention.watch = None
