"""Documents inside a training sequence: where each begins, and attention that stays inside them.

A document begins at an end-of-document token, which the evaluation also puts before a document, and
ends before the next one. What a sequence has before its first such token is the rest of a document
that began in another sequence.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from models.kernels import compiled
from models.products import without_means

_BLOCK = 128
"""Queries and keys in a block of the mask on a GPU, as PyTorch's kernels have them."""

Activation = Tensor | tuple[Tensor, Tensor]
"""What layers pass on: ``[sequence, batch, hidden]``, and the starts of documents if attention
stays inside them."""


def document_starts(tokens: Tensor, begins: int) -> Tensor:
    """The index of the first position of each position's document.

    Args:
        tokens: ``[batch, sequence]`` integers.
        begins: the token that begins documents.

    Returns:
        ``[batch, sequence]`` int64; 0 before the first such token.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where(tokens == begins, index, 0).cummax(1).values


def split(x: Activation) -> tuple[Tensor, Tensor | None]:
    """The hidden states, and the starts of documents or None."""
    return (x, None) if isinstance(x, Tensor) else x


def joined(x: Tensor, starts: Tensor | None) -> Activation:
    """What the next layer gets."""
    return x if starts is None else (x, starts)


def positions_of(starts: Tensor) -> Tensor:
    """Positions inside documents, from 0; ``[batch, sequence]``."""
    return torch.arange(starts.shape[1], device=starts.device) - starts


def same_document(starts: Tensor, causal: bool) -> Tensor:
    """Which keys a query sees: ``[batch, 1, queries, keys]`` booleans."""
    seen = starts.unsqueeze(-1) == starts.unsqueeze(-2)
    return (seen.tril() if causal else seen).unsqueeze(1)


def attention_by_flex(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """Causal softmax attention inside documents by PyTorch's FlexAttention.

    It leaves out blocks of keys that no query of a block sees, and never holds a whole mask. As in
    `models.products.torch_attention`, the means of keys and values are subtracted in 16 bits.

    Args:
        q, k, v: ``[batch, heads, sequence, head]``.
        starts: from `document_starts`.
    """
    flex = _flex(q.device.type)
    mask = block_mask(starts)
    if k.dtype.itemsize > 2:
        mixed: Tensor = flex(q, k, v, block_mask=mask)
        return mixed
    keys, values, shared = without_means(k, v)
    mixed = flex(q, keys, values, block_mask=mask)
    return mixed + shared


@cache
def _flex(device: str) -> Any:
    """FlexAttention, compiled where there is a kernel for it; uncompiled it holds all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention) if device == "cuda" else flex_attention


def block_mask(starts: Tensor) -> Any:
    """FlexAttention's mask of causal attention inside documents, without a matrix of positions.

    Documents are contiguous, so a block of queries sees the blocks of keys from the start of its
    first query's document up to itself, and whole are those before it that are inside the document
    of its last query.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = starts.shape[1]
    count = -(-length // _BLOCK)
    block = torch.arange(count, device=starts.device)
    firsts = starts[:, block * _BLOCK].unsqueeze(-1)
    lasts = starts[:, (block * _BLOCK + _BLOCK - 1).clamp_max(length - 1)].unsqueeze(-1)
    queries, keys = block.unsqueeze(-1), block
    seen = (keys >= firsts // _BLOCK) & (keys <= queries)
    inside = (queries + 1) * _BLOCK <= length  # a cut block is masked by position
    whole = (lasts <= keys * _BLOCK) & (keys < queries) & inside

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[b, query])

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole),
        *_listed(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and their numbers, these first."""
    dense = blocks.unsqueeze(1).to(torch.int32)
    order = dense.argsort(dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32), order.to(torch.int32)
