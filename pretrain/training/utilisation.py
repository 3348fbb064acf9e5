"""How well a run uses its devices: for the log, next to the speed."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

from pretrain.config.recipe import Config
from pretrain.distributed.grid import Grid
from pretrain.engine.accelerators import device_named
from pretrain.engine.sizes import Sizes, sizes_of


class Utilisation:
    """Tokens per second of a device, model FLOPs utilisation, and the peak of memory.

    MFU is the FLOPs of the model (`Sizes.flops`: 6 N a token for its matrices, and 12 L s w for
    attention, half of it if it is causal; Chowdhery et al. 2022, appendix B) in a second, divided
    by the published dense rate of the devices in the precision of the run. Recomputed activations
    do not count. It is not known on a CPU, and on a device without a published rate here.
    """

    def __init__(self, config: Config, grid: Grid) -> None:
        self._tokens = config.train.global_batch * config.model.context
        self._device, self._count = grid.device, grid.world_size
        self._rate = _rate(config, grid.device)
        self._sizes: Sizes | None = sizes_of(config) if self._rate else None

    def figures(self, speed: float) -> dict[str, Any]:
        """The group ``device`` of a line.

        Args:
            speed: tokens per second of the whole run.
        """
        figures = {"tokens_per_second": speed / self._count, "peak_memory_gib": self._peak()}
        if self._sizes is not None:
            flops = self._sizes.flops(self._tokens) / self._tokens * speed
            figures["mfu"] = flops / (self._count * self._rate)
        return figures

    def _peak(self) -> float:
        """GiB that this process used at most: of its GPU, by PyTorch's allocator, or of memory."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _rate(config: Config, device: torch.device) -> float:
    """Published FLOPs per second of a device; 0 if they are not known."""
    known = device_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is None:
        return 0.0
    return (known.tflops if config.precision == "bf16" else known.tflops32) * 1e12
