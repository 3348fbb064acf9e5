"""A product with the value of an activation function, which the backward pass computes again.

What the function returns is a quarter of what a layer keeps for the backward pass, and computing it
again takes one pass over memory. This is a part of selective recomputation (Korthikanti et al.
2022); compiled code leaves the choice to the compiler (`models.kernels.compiled`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.config import ActivationFunction

_FORM = {"gelu": "none", "gelu_tanh": "tanh"}
"""What PyTorch calls a GELU."""


def activation(kind: ActivationFunction, parts: tuple[Tensor, ...]) -> Tensor:
    """GELU of one tensor, or SiLU of a gate times another tensor.

    Args:
        parts: the tensor; for SwiGLU the gate and the tensor.
    """
    if kind == "swiglu":
        gate, inner = parts
        return F.silu(gate) * inner
    (inner,) = parts
    return F.gelu(inner, approximate=_FORM[kind])


def activated_linear(
    kind: ActivationFunction, parts: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """`activation` times a weight, plus a bias; contiguous tensors give the same bits.

    Args:
        parts: ``[..., width]`` each.
        weight: ``[rows, width]``.
        bias: ``[rows]``.

    Returns:
        ``[..., rows]``.
    """
    output: Tensor = _ActivatedLinear.apply(kind, weight, bias, *parts)  # type: ignore[no-untyped-call]
    return output


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kind: ActivationFunction, weight: Tensor, bias: Tensor | None, *parts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weight, *parts)
        ctx.kind, ctx.has_bias = kind, bias is not None
        return F.linear(activation(kind, parts), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        weight, *parts = ctx.saved_tensors
        of_weight: Tensor | None = None
        of_bias: Tensor | None = None
        of_parts: list[Tensor] | list[None] = [None] * len(parts)
        flat = upstream.reshape(-1, upstream.shape[-1])
        if ctx.needs_input_grad[1]:
            value = activation(ctx.kind, tuple(parts))
            of_weight = flat.T @ value.reshape(-1, value.shape[-1])
            del value
        if ctx.has_bias and ctx.needs_input_grad[2]:
            of_bias = flat.sum(0)
        if any(ctx.needs_input_grad[3:]):
            of_value = (flat @ weight).view_as(parts[0])
            of_parts = _differentiated(ctx.kind, of_value, parts)
        return None, of_weight, of_bias, *of_parts


def _differentiated(
    kind: ActivationFunction, upstream: Tensor, parts: list[Tensor]
) -> list[Tensor]:
    """The gradients of the parts, given that of `activation`."""
    if kind == "swiglu":
        gate, inner = parts
        of_gate = torch.ops.aten.silu_backward(upstream * inner, gate)
        return [of_gate, upstream * F.silu(gate)]
    return [torch.ops.aten.gelu_backward(upstream, *parts, approximate=_FORM[kind])]
