"""What makes the same numbers faster on the machine at hand."""

from __future__ import annotations

import ctypes
import sys

import torch

from models.kernels import Kernels
from pretrain.config.recipe import Config
from pretrain.distributed.grid import Grid

_PRODUCTS_UP_TO = 2048
"""Tokens of context up to which products were seen to be faster (benchmarks/attention.py)."""
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
"""Of glibc's mallopt."""


def choose_kernels(config: Config, grid: Grid) -> Kernels:
    """The kernels that the recipe asks for; what it leaves open by device and precision.

    Args:
        config: with its precision resolved.
    """
    speed = config.speed
    attention = speed.attention
    if attention == "auto":
        fast = grid.device.type == "cpu" and config.precision == "bf16"
        attention = "products" if fast and config.model.context <= _PRODUCTS_UP_TO else "sdpa"
    return Kernels(
        recompute=config.grid.activation_checkpointing,
        attention=attention,
        loss_bytes=speed.loss_bytes(grid.device.type),
        compiled=speed.compile,
    )


def keep_freed_memory(device: torch.device) -> None:
    """Let the C library keep what tensors free instead of giving it back to the kernel.

    By default glibc maps every large tensor anew, and the kernel clears its pages at first touch:
    a tenth of a step on a CPU. Without glibc nothing changes.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, 1 << 30)
        mallopt(_TOP_PAD, 64 << 20)
        mallopt(_ARENA_MAX, 1)  # the backward pass runs in a thread of its own
