"""Chooses settings that compute the same numbers faster on this machine."""

from __future__ import annotations

import ctypes
import sys

import torch

from models.kernels import Kernels
from pretrain.config.recipe import Config
from pretrain.distributed.grid import Grid

_PRODUCTS_UP_TO = 2048
"""Context in tokens up to which products were measured to be faster (benchmarks/attention.py)."""
_FLEX_HEAD = 16
"""Width of the smallest head for which FlexAttention has a kernel."""
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
"""Parameters of glibc's mallopt."""


def choose_kernels(config: Config, grid: Grid) -> Kernels:
    """The kernels of the recipe; values that it leaves open depend on device and precision.

    Args:
        config: with its precision resolved.
    """
    speed = config.speed
    attention = speed.attention
    if attention == "auto":
        fast = grid.device.type == "cpu" and config.precision == "bf16"
        attention = "products" if fast and config.model.context <= _PRODUCTS_UP_TO else "sdpa"
    on_gpu = grid.device.type == "cuda"
    by_flex = on_gpu and speed.attention != "products" and config.model.head_size >= _FLEX_HEAD
    return Kernels(
        recompute=config.grid.activation_checkpointing,
        attention=attention,
        documents="flex" if by_flex else "products",
        loss_bytes=speed.loss_bytes(grid.device.type),
        compiled=speed.compile,
    )


def keep_freed_memory(device: torch.device) -> None:
    """Make the C library keep the memory of freed tensors instead of returning it to the kernel.

    By default glibc maps new pages for every large tensor, and the kernel clears them at first use:
    a tenth of a step on a CPU. Without glibc nothing changes.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, 1 << 30)
        mallopt(_TOP_PAD, 64 << 20)
        mallopt(_ARENA_MAX, 1)  # the backward pass runs in a separate thread
