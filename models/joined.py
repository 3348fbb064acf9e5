"""One product with several weights, in few operations.

Autograd's own form (concatenate, multiply, split) takes a dozen operations more, which the host of
a GPU must start for every layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_in_one(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...]) -> Tensor:
    """``x`` times every weight, plus the biases, as one product.

    Args:
        x: ``[..., width]``.
        weights: ``[rows, width]`` each.
        biases: ``[rows]`` each; empty: none.

    Returns:
        ``[..., all rows]``.
    """
    if torch.compiler.is_compiling():  # the compiler joins the operations by itself
        return F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)
    output: Tensor = _Joined.apply(x, len(weights), *weights, *biases)  # type: ignore[no-untyped-call]
    return output


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *parts: Tensor) -> Tensor:
        weights, biases = parts[:count], parts[count:]
        # Not the joined weight: every layer would keep a copy until the backward pass.
        ctx.save_for_backward(x, *weights)
        ctx.rows, ctx.has_biases = [part.shape[0] for part in weights], bool(biases)
        return F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        flat = upstream.reshape(-1, upstream.shape[-1])
        of_x: Tensor | None = None
        of_parts: tuple[Tensor | None, ...] = (None,) * len(ctx.needs_input_grad[2:])
        if ctx.needs_input_grad[0]:
            of_x = (flat @ torch.cat(weights)).view(x.shape)
        if any(ctx.needs_input_grad[2:]):
            of_weights = (flat.T @ x.reshape(-1, x.shape[-1])).split(ctx.rows)
            of_biases = flat.sum(0).split(ctx.rows) if ctx.has_biases else ()
            of_parts = (*of_weights, *of_biases)
        return of_x, None, *of_parts
