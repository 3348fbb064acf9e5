"""Chooses settings that compute the same numbers faster on this machine."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch

from models.kernels import Kernels, compiled
from pretrain.config.recipe import Config
from pretrain.distributed.grid import Grid
from pretrain.engine.sizes import sizes_of

_PRODUCTS_UP_TO = 2048
"""Context in tokens up to which products were measured to be faster (benchmarks/attention.py)."""
_FLEX_HEAD = 16
"""Width of the smallest head for which FlexAttention has a kernel."""
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
"""Parameters of glibc's mallopt."""


_RATE = 2e14
"""FLOPs per second of code that is not compiled, on a GPU of this decade; a GPU with another rate
only moves the length of run from which compiled code is chosen."""
_COMPILED_RATE = 4e14
_LAUNCHES = 2.5e-3
"""Seconds that the host needs to start the operations of a layer, forward and backward."""
_GAPS = 4.0
"""Up to this many times that a pass gains a percent or more from a graph, because a GPU waits less
between two operations of a graph."""
_WORTH = 120.0
"""Seconds that a run must take for the compiler's half a minute to pay."""


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
    fused = compiles(config, grid)
    by_flex = on_gpu and speed.attention != "products" and config.model.head_size >= _FLEX_HEAD
    return Kernels(
        recompute=config.grid.activation_checkpointing,
        selective=recomputes_selectively(config, grid.device.type),
        attention=attention,
        documents="flex" if by_flex else "products",
        joined=on_gpu,
        loss_bytes=speed.loss_bytes(grid.device.type, fused and grid.tensor == 1),
        compiled=fused,
    )


def recomputes_selectively(config: Config, device: str) -> bool:
    """Whether the backward pass computes again what takes no product (`speed.recompute`).

    Args:
        device: device type, cpu or cuda.
    """
    if config.grid.activation_checkpointing:  # of whole blocks
        return False
    choice = config.speed.recompute
    return device == "cpu" if choice == "auto" else choice


def compiles(config: Config, grid: Grid) -> bool:
    """Whether the blocks of a run are compiled (`speed.compile`)."""
    if config.speed.compile != "auto":
        return config.speed.compile
    return grid.device.type == "cuda" and not _why_eager(config, grid)


def _why_eager(config: Config, grid: Grid) -> str:
    """Why ``auto`` does not compile a run on a GPU; empty if it does.

    The machine is tried last, which takes some seconds.
    """
    if config.grid.zero_stage == 3:
        return "ZeRO 3 gathers weights inside the blocks"
    passes = config.train.global_batch / grid.data  # of one sequence
    seconds = max(
        _flops(config) * passes / (grid.tensor * grid.pipeline) / _RATE,
        _LAUNCHES * config.model.num_layers,
    )
    if seconds * config.train.steps <= _WORTH:
        return "too short to gain from it"
    return why_not_compiled()


def records_passes(config: Config, grid: Grid) -> bool:
    """Whether forward and backward passes are recorded as CUDA graphs (`speed.graph`)."""
    if grid.device.type != "cuda" or not config.is_flat or config.speed.graph is False:
        return False
    if grid.world_size > 1:  # a graph would have to hold the collectives of its passes
        return False
    return config.speed.graph is True or is_short(config)


def is_short(config: Config) -> bool:
    """Whether a GPU computes a pass in about the time in which the host starts its operations."""
    size = config.train.micro_batch
    micro = (1 if size == "auto" else size) or config.train.global_batch
    seconds = _flops(config) * micro / _COMPILED_RATE
    return seconds < _GAPS * _LAUNCHES * config.model.num_layers


def _flops(config: Config) -> float:
    """FLOPs of forward and backward pass of a sequence; without the head if its size is not
    known."""
    model = config.model
    if not model.vocabulary_size:
        config = config.model_copy(
            update={"model": model.model_copy(update={"vocabulary_size": 1})}
        )
    return sizes_of(config).flops(model.context)


@cache
def why_not_compiled() -> str:
    """Why this machine cannot compile code for its GPU; empty if it can.

    The compiler needs Triton and a C compiler, which an installation may lack.
    """
    try:
        compiled(lambda x: x.sin() + 1)(torch.ones(8, device="cuda"))
    except Exception as error:  # whatever a missing or unfit tool raises
        return str(error).strip().splitlines()[0] or type(error).__name__
    return ""


def speed_in_words(config: Config, grid: Grid) -> list[str]:
    """What `speed` chose for a run on a GPU, and why; empty on a CPU."""
    if grid.device.type != "cuda":
        return []
    words = []
    if config.speed.compile == "auto":
        why = _why_eager(config, grid)
        words.append(
            f"not compiled: {why} (speed.compile)"
            if why
            else "blocks are compiled during the first updates (speed.compile)"
        )
    if config.speed.graph == "auto" and records_passes(config, grid):
        words.append("passes are started as CUDA graphs (speed.graph)")
    if config.speed.graph is True and grid.world_size > 1:
        words.append("no CUDA graphs: several processes train (speed.graph)")
    return words


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
