"""How many runs of a sweep a GPU should have at once."""

from __future__ import annotations

import torch

from pretrain.config.recipe import Config
from pretrain.engine.layout import empty_grid
from pretrain.engine.precision import with_precision
from pretrain.engine.speed import records_passes

_BUSY = 0.2
"""Share of the published rate from which the device, not the host, limits an update."""
_ROOM = 0.9
"""Share of a GPU's memory that runs may take together."""
_CONTEXT = 1.5
"""GiB of a GPU that a process takes in addition to PyTorch's tensors."""


def runs_per_gpu(
    config: Config, processes: int, mfu: float | None, peak: float, memory: float
) -> tuple[int, str]:
    """How many runs at once to give a GPU, and why.

    Processes take turns on a GPU. With a model of 6.8 M parameters on an H200, two processes
    together made 1.16 times as many tokens per second as one if the host started each operation,
    and 0.9 times as many with CUDA graphs, as did four.

    Args:
        config: of a run.
        processes: of each run.
        mfu: share of the GPU's published rate that one run reaches; None if the rate is not known.
        peak: GiB of PyTorch's tensors of one run.
        memory: GiB of the GPU.
    """
    if processes > 1:
        return 1, "each run has several processes"
    if records_passes(with_precision(config, torch.device("cuda")), empty_grid(config, "cuda", 1)):
        return 1, "updates start as CUDA graphs, so that one run keeps the GPU busy"
    if mfu is not None and mfu >= _BUSY:
        return 1, f"one run reaches {mfu:.0%} of the GPU's rate"
    if 2 * (peak + _CONTEXT) > _ROOM * memory:
        return 1, f"two would take {2 * (peak + _CONTEXT):.3g} of its {memory:.3g} GiB"
    return 2, "the host limits one run; two together are faster by about a sixth"


def gpu_memory() -> float:
    """GiB of the first GPU; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    return float(torch.cuda.get_device_properties(0).total_memory) / 2**30
