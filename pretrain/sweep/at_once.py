"""How many runs of a sweep a GPU should have at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pretrain.config.recipe import Config
from pretrain.engine.layout import empty_grid
from pretrain.engine.precision import with_precision
from pretrain.engine.speed import is_short, records_passes

_ROOM = 0.9
"""Share of a GPU's memory that runs may take together."""
_CONTEXT = 1.5
"""GiB of a GPU that a process takes in addition to PyTorch's tensors."""


def runs_per_gpu(
    configs: Iterable[Config], processes: int, peak: float, memory: float
) -> tuple[int, str]:
    """How many runs at once to give a GPU, and why.

    Processes take turns on a GPU. With a model of 6.8 M parameters on an H200 (26 November 2026),
    two processes together made 1.16 times as many tokens per second as one if the host started
    each operation, and 0.9 times as many with CUDA graphs. Larger models were not tried.

    Args:
        configs: of the runs to do.
        processes: of each run.
        peak: GiB of PyTorch's tensors of one run, which was timed.
        memory: GiB of the GPU.
    """
    if processes > 1:
        return 1, "each run has several processes"
    for config in configs:
        if why := _keeps_busy(with_precision(config, torch.device("cuda"))):
            return 1, why
    both = 2 * (peak + _CONTEXT)
    if both > _ROOM * memory:
        return 1, f"two would take {both:.3g} GiB, more than {_ROOM:.0%} of its {memory:.3g}"
    return 2, "the host limits one run of such a small model; two together were 1.16 times as fast"


def _keeps_busy(config: Config) -> str:
    """Why one run keeps a GPU busy; empty if it does not."""
    if records_passes(config, empty_grid(config, "cuda", 1)):
        return "updates start as CUDA graphs, so that one run keeps the GPU busy"
    return "" if is_short(config) else "the passes of one run are long enough to keep the GPU busy"
