"""How layers are computed, never what: choices that change speed and memory, not the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Kernels:
    """The default is right on every device; `pretrain.engine.speed` chooses what is fast on one."""

    recompute: bool = False
    """Compute blocks again in the backward pass instead of keeping what they need."""
    attention: Literal["sdpa", "products"] = "sdpa"
    """PyTorch's scaled dot-product attention, or batched matrix products (`models.products`)."""
    loss_bytes: int = 32 << 20
    """Float32 logits that the loss holds at once."""
    compiled: bool = False
    """Fuse what lies between the matrix products of a block (torch.compile)."""


DEFAULT_KERNELS = Kernels()
