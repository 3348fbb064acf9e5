"""Choices of how layers are computed: they change speed and memory, not the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch._functorch.config as functorch


@dataclass(frozen=True)
class Kernels:
    """The defaults work on every device; `pretrain.engine.speed` chooses the fast ones for one."""

    recompute: bool = False
    """Compute blocks again in the backward pass instead of keeping what they need."""
    selective: bool = False
    """Compute only what takes no product again: values of activation functions and, in compiled
    code, outputs of norms."""
    attention: Literal["sdpa", "products"] = "sdpa"
    """PyTorch's scaled dot-product attention, or batched matrix products (`models.products`)."""
    documents: Literal["products", "flex"] = "products"
    """Attention inside documents: matrix products, which work everywhere, or PyTorch's
    FlexAttention (`models.documents`)."""
    joined: bool = False
    """Fewer operations: the weights of queries, keys and values, which stay separate parameters,
    are multiplied in one product, and the biases of outputs are added inside theirs."""
    loss_bytes: int = 32 << 20
    """The number of float32 logits that the loss holds at once."""
    compiled: bool = False
    """Fuse the operations between the matrix products of a block (torch.compile)."""


DEFAULT_KERNELS = Kernels()


_BUDGET = 0.9
"""Share of the activations that compiled code may keep if it computes some again: PyTorch then
computes again all that takes no product, and nothing else (`tests/models/test_chain.py`)."""


def compiled(function: Callable[..., Any], selective: bool = False) -> Callable[..., Any]:
    """``function`` by torch.compile, for one shape, as the same code on every machine.

    By default the compiler times several forms of a kernel on the device when it first meets it,
    and keeps the fastest in a cache. Another machine, or an empty cache, may then sum in another
    order: a resumed run was no longer equal bit by bit (seen on an H100).

    Args:
        selective: keep less for the backward pass, as in `Kernels`.
    """
    code = torch.compile(function, dynamic=False, options={"deterministic": True})
    if not selective:
        return code

    def run(*arguments: Any) -> Any:
        with functorch.patch(activation_memory_budget=_BUDGET):
            return code(*arguments)

    return run
