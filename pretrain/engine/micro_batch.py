"""``train.micro_batch: auto``: the largest micro batch that a process's memory holds.

It changes how fast an update is made, and its numbers only by rounding: the order of the data
follows the global batch.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from pretrain.config.recipe import Config
from pretrain.distributed.cores import usable_memory
from pretrain.distributed.grid import Grid
from pretrain.engine.layout import empty_grid, layout_of
from pretrain.engine.memory import ROOM, memory_of, process_bytes
from pretrain.engine.sizes import Sizes, sizes_of

AUTO = "auto"
_CPU_TOKENS = 8192
"""Tokens of a pass; from more, a CPU gains little, however much memory it has."""
_MICRO_BATCHES_PER_STAGE = 4
"""Micro batches for each stage of a pipeline that keep its stages busy for 80 % of the time."""


@dataclass(frozen=True)
class MicroBatch:
    """A size that was found, and why it is not larger."""

    size: int
    why: str

    def in_words(self) -> str:
        """``micro batch 8: 16 would need 71 GB of ...``."""
        return f"micro batch {self.size}: {self.why} (train.micro_batch: auto)"


def with_size(config: Config, size: int) -> Config:
    """The recipe with another micro batch."""
    return config.model_copy(
        update={"train": config.train.model_copy(update={"micro_batch": size})}
    )


def largest_micro_batch(
    config: Config, device: str, count: int, memory: float, sizes: Sizes | None = None
) -> MicroBatch:
    """The largest size whose estimated memory leaves a margin, and that fills a pipeline.

    Args:
        device: type of the devices (cuda, cpu).
        count: number of processes.
        memory: bytes that each of them has.

    Raises:
        UsageError: if the grid does not use all processes, or cannot divide the batch.
    """
    sizes = sizes or sizes_of(config)
    base, slack = process_bytes(device)
    grid = empty_grid(config, device, count)
    share = config.train.global_batch // grid.data

    def needed(size: int) -> float:
        layout = layout_of(with_size(config, size), device, count, base, slack)
        return sum(memory_of(sizes, layout).values())

    passes = min(share, _MICRO_BATCHES_PER_STAGE * grid.pipeline if grid.pipeline > 1 else 1)
    allowed = [size for size in range(1, share // passes + 1) if share % size == 0]
    why = "all sequences of a process"
    if grid.pipeline > 1:
        why = f"{share // allowed[-1]} micro batches fill {grid.pipeline} stages"
    if device == "cpu":
        few = [size for size in allowed if size * sizes.context <= _CPU_TOKENS] or [1]
        if few != allowed:
            why = f"a CPU gains little from more than {_CPU_TOKENS:,} tokens at once"
        allowed = few
    available = f"{ROOM:.0%} of the {memory / 1e9:.3g} GB of a process"
    for size in reversed(allowed):
        if needed(size) <= ROOM * memory:
            return MicroBatch(size, why)
        why = f"{size} would need about {needed(size) / 1e9:.3g} GB, more than {available}"
    return MicroBatch(1, f"even this needs about {needed(1) / 1e9:.3g} GB, more than {available}")


def memory_here(grid: Grid) -> float:
    """Bytes of memory of each process: of its GPU, or its share of the machine's, the least of
    all processes; a collective call."""
    found: list[tuple[str, int]] = grid.gather((platform.node(), memory_of_device(grid.device)))
    if grid.device.type == "cuda":
        return min(memory for _, memory in found)
    nodes = [node for node, _ in found]
    return min(memory / nodes.count(node) for node, memory in found)


def memory_of_device(device: torch.device) -> int:
    """Bytes of a GPU, or those of the machine that its processes may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return usable_memory()


def memory_alone(device: torch.device, count: int) -> float:
    """`memory_here` without the other processes, for a dry run."""
    if device.type == "cuda":
        return memory_of_device(device)
    return memory_of_device(device) / int(os.environ.get("LOCAL_WORLD_SIZE", count))
