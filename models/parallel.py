"""Tensor and sequence parallelism of single operations, by Megatron-core's mappings.

Activations are laid out ``[sequence, batch, hidden]``, as in Megatron, since sequence
parallelism splits the first dimension.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from models.wide_sums import embedding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class TensorParallel:
    """This process's place in its tensor-parallel group; the default is a model held whole."""

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    sequence_parallel: bool = False
    """Split activations between the tensor-parallel blocks along the sequence."""

    def __post_init__(self) -> None:
        if self.sequence_parallel and self.size > 1 and not torch.cuda.is_available():
            answer_current_device_on_cpu()


def answer_current_device_on_cpu() -> None:
    """Let Megatron's gathers, which ask CUDA for a device, allocate on a machine without one."""
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


@cache
def megatron_module(module: str) -> Any:
    """A module of `megatron.core.tensor_parallel`, imported late (3 s) and without its warnings
    about optional GPU packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"megatron.core.tensor_parallel.{module}")


def enter(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """Bring ``x`` to a column-parallel product: gather the sequence, or reduce the gradient."""
    if tp.size == 1:
        return x
    mappings = megatron_module("mappings")
    if tp.sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(x, group=tp.group)
    return mappings.copy_to_tensor_model_parallel_region(x, group=tp.group)


def leave(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """Sum the partial results of a row-parallel product over the group."""
    if tp.size == 1:
        return x
    mappings = megatron_module("mappings")
    if tp.sequence_parallel:
        return mappings.reduce_scatter_to_sequence_parallel_region(x, group=tp.group)
    return mappings.reduce_from_tensor_model_parallel_region(x, group=tp.group)


def sum_gradient(weight: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """Identity whose gradient is summed over the group.

    For a replicated weight of which each rank sees a part of the work (other heads, or other
    positions of the sequence): without the sum the replicas would drift apart.
    """
    if tp.size == 1:
        return weight
    mappings = megatron_module("mappings")
    return mappings.copy_to_tensor_model_parallel_region(weight, group=tp.group)


def replicated(weight: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """A replicated weight used between the parallel blocks, where sequence parallelism splits."""
    return sum_gradient(weight, tp) if tp.sequence_parallel else weight


def embed(tokens: torch.Tensor, weight: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """Look up a vocabulary-parallel embedding.

    Args:
        tokens: ``[sequence, batch]`` integers.
        weight: this rank's ``[vocabulary / size, hidden]`` rows.

    Returns:
        ``[sequence, batch, hidden]``, or this rank's part of the sequence.
    """
    if tp.size == 1:
        return embedding(tokens, weight)
    start = tp.rank * weight.shape[0]
    local = tokens - start
    outside = (local < 0) | (local >= weight.shape[0])
    found = embedding(local.masked_fill(outside, 0), weight)
    return leave(found.masked_fill(outside.unsqueeze(-1), 0.0), tp)
