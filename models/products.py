"""Attention by batched matrix products, recomputed in the backward pass.

On a CPU, PyTorch's own attention kernel reaches a third of the rate of its matrix products at
contexts of a few hundred tokens. Plain products over blocks of queries are faster and need as
little memory, because the scores are recomputed when their gradient is needed. Both passes are
custom operators, which a compiler leaves unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 128
"""Queries per block: under a causal mask a block leaves out the keys after its last query."""
_ADDED = 32
"""Number of positions that are added one by one in a mean over the sequence."""


def attention_by_products(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, starts: Tensor | None = None
) -> Tensor:
    """softmax(q kᵀ / √head) v.

    Args:
        q, k, v: ``[batch, heads, sequence, head]``, with equally many queries and keys. In bf16
            the scores are rounded to bf16 before the softmax, whose sums are float32.
        starts: ``[batch, sequence]``, the first position of each position's document, if a query
            sees its own document only.

    Returns:
        ``[batch, heads, sequence, head]``.
    """
    flat = (x.reshape(-1, *x.shape[-2:]).contiguous() for x in (q, k, v))
    mixed: Tensor = _forward(*flat, causal, starts)
    return mixed.view(q.shape)


@torch.library.custom_op("rankdecay::attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, starts: Tensor | None) -> Tensor:
    mixed = torch.empty_like(v)
    for rows, stop in _blocks(q.shape[1], causal):
        weights = _weights(q[:, rows], k[:, :stop], rows, causal, starts)
        mixed[:, rows] = torch.bmm(weights, v[:, :stop])
    return mixed


@torch.library.custom_op("rankdecay::attention_backward", mutates_args=())
def _backward(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    upstream, scale = upstream.contiguous(), q.shape[-1] ** -0.5
    of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    keys, values = _centered(k), _centered(v)
    for rows, stop in _blocks(q.shape[1], causal):
        weights = _weights(q[:, rows], k[:, :stop], rows, causal, starts)
        of_v[:, :stop] += torch.bmm(weights.mT, upstream[:, rows])
        of_weights = torch.bmm(upstream[:, rows], values[:, :stop].mT)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_scores.mul_(scale)
        of_q[:, rows] = torch.bmm(of_scores, keys[:, :stop])
        of_k[:, :stop] += torch.bmm(of_scores.mT, q[:, rows])
    return of_q, of_k, of_v


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool, starts: Tensor | None) -> Tensor:
    return torch.empty_like(v)


@_backward.register_fake
def _(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *factors, ctx.causal, starts = inputs
    ctx.save_for_backward(*factors, starts)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    *factors, starts = ctx.saved_tensors
    return (*_backward(upstream, *factors, ctx.causal, starts), None, None)


_forward.register_autograd(_differentiate, setup_context=_keep)


def _centered(x: Tensor) -> Tensor:
    """``[batch x heads, keys, head]`` minus its mean over the keys, in low precision only.

    The gradients of a query's scores sum to 0, so a part that all its keys (or values) share
    cancels in them. In bf16 its rounding error would remain: up to 2 % of the gradient in early
    training.
    """
    if x.dtype.itemsize > 2:
        return x
    wide = x.float()
    return (wide - wide.mean(1, keepdim=True)).to(x.dtype)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """PyTorch's softmax attention; shapes as in `attention_by_products`.

    A part that all keys of a head share cancels in the softmax and in the gradients of the scores.
    A part that all values share is added to the output unchanged. PyTorch's kernels round the
    gradients of the scores to 16 bits before they cancel, on CPUs and GPUs: up to 14 % of a query's
    gradient was rounding error. Without the means the error is as small as with attention in
    float32 (`tests/models/test_bf16.py`).
    """
    if k.dtype.itemsize > 2:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    keys, values, shared = without_means(k, v)
    return F.scaled_dot_product_attention(q, keys, values, is_causal=causal) + shared


def without_means(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values minus their means over the sequence, and the mean of the values.

    The means are constants for autograd: the result of the attention does not depend on them, so
    their gradient is zero, and its computation would take two passes over the keys and values.
    """
    shared = mean_over_sequence(v.detach())
    return k - mean_over_sequence(k.detach()), v - shared, shared


def mean_over_sequence(x: Tensor) -> Tensor:
    """The mean over the sequence, ``[batch, heads, 1, head]``, summed in float32.

    Compiled code of a GPU adds some positions one by one before the sum over the rest. It then
    reads keys, whose first dimension in memory is the sequence, about four times as fast (H100).
    """
    if not (x.is_cuda and torch.compiler.is_compiling()):
        return x.mean(2, keepdim=True, dtype=torch.float32).to(x.dtype)
    length = x.shape[2]
    first, *others = x.unflatten(2, (-1, math.gcd(length, _ADDED))).unbind(3)
    total: Tensor = first.float()
    for other in others:
        total = total + other
    return (total.sum(2, keepdim=True) / length).to(x.dtype)


def _blocks(length: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """Blocks of query rows, and the number of keys that each sees."""
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        yield slice(start, stop), stop if causal else length


def _weights(q: Tensor, k: Tensor, rows: slice, causal: bool, starts: Tensor | None) -> Tensor:
    """``[batch x heads, queries, keys]``, whose rows sum to 1; ``rows``: the queries."""
    scores = torch.bmm(q, k.mT).mul_(q.shape[-1] ** -0.5)
    if causal:
        unseen = torch.full((q.shape[1], k.shape[1] - rows.start), -torch.inf, device=q.device)
        scores[:, :, rows.start :] += unseen.triu_(1).to(q.dtype)
    if starts is not None:
        others = starts[:, rows].unsqueeze(-1) != starts[:, None, : k.shape[1]]
        by_head = scores.view(len(starts), -1, *scores.shape[1:])
        by_head.masked_fill_(others.unsqueeze(1), -torch.inf)
    return torch.softmax(scores, -1)
