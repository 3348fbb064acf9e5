"""LayerNorm and embedding whose gradients are summed in float32 on a CPU too.

In bf16, PyTorch's CPU kernels add the gradients of LayerNorm's weight and bias, and of an
embedding,
row by row in bf16: at 16,000 tokens most of them is lost in rounding. CUDA kernels, and the code
that `torch.compile` makes for LayerNorm, sum in float32 and are used unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 256
"""Number of tokens that are converted to float32 at a time, so that they stay in the cache."""


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """LayerNorm over the last dimension of ``x``."""
    if not _sums_narrowly(x):
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)
    output: Tensor = _LayerNorm.apply(x, weight.float(), bias.float(), epsilon)  # type: ignore[no-untyped-call]
    return output


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of ``weight`` (``[vocabulary, hidden]``) for ``tokens`` of any shape."""
    if not _sums_narrowly(weight):
        return F.embedding(tokens, weight)
    rows: Tensor = _Embedding.apply(tokens, weight)  # type: ignore[no-untyped-call]
    return rows


def _sums_narrowly(x: Tensor) -> bool:
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    return narrow and x.device.type == "cpu" and not torch.compiler.is_compiling()


class _LayerNorm(torch.autograd.Function):
    """LayerNorm of a low-precision ``x`` with a float32 weight and bias."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float
    ) -> Tensor:
        y, mean, scale = torch.native_layer_norm(x, weight.shape, weight, bias, epsilon)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        return y

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        x, weight, bias, mean, scale = ctx.saved_tensors
        width = weight.shape[0]
        of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        parts = zip(
            *(t.reshape(-1, width).split(_ROWS) for t in (upstream, x, of_x)),
            *(t.reshape(-1, 1).split(_ROWS) for t in (mean, scale)),
            strict=True,
        )
        for up, rows, out, center, inverse in parts:
            gradients = torch.ops.aten.native_layer_norm_backward(
                up.float(), rows.float(), weight.shape, center, inverse, weight, bias,
                [True, True, True],
            )  # fmt: skip
            out.copy_(gradients[0])
            of_weight += gradients[1]
            of_bias += gradients[2]
        return of_x, of_weight, of_bias, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(tokens)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        (tokens,) = ctx.saved_tensors
        # Sums only of the tokens that occur: a float32 copy of a whole vocabulary is large.
        rows, places = tokens.unique(return_inverse=True)
        sums = torch.zeros(len(rows), ctx.shape[1])
        sums.index_add_(0, places.flatten(), upstream.flatten(0, -2).float())
        of_weight = torch.zeros(ctx.shape, dtype=ctx.dtype)
        of_weight[rows] = sums.to(ctx.dtype)
        return None, of_weight
