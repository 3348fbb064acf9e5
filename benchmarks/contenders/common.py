"""What contenders share: the device, its arithmetic, and the batches on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.contenders.shapes import Shape, batches

Step = Callable[[], float]


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half() -> bool:
    """bf16 where it is fast, as `precision: auto` decides."""
    from pretrain.engine.precision import multiplies_bf16

    return device().type == "cuda" or multiplies_bf16()


def tensors(shape: Shape) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches, on the device: copied from pinned memory, so that no one waits for a copy."""
    on_gpu = device().type == "cuda"
    for pair in batches(shape):
        host = (torch.from_numpy(part) for part in pair)
        pinned = (part.contiguous().pin_memory() if on_gpu else part for part in host)
        inputs, labels = (part.to(device(), non_blocking=True) for part in pinned)
        yield inputs, labels
