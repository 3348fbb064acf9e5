"""Assembles whole tensors from the parts that each process's optimizer owns, one tensor at a time.

The calls are collective within a stage: the (tensor x data) group of processes with the same
layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.roles import info_of
from pretrain.distributed.grid import Grid
from pretrain.engine.masters import local_shape

Item = TypeVar("Item")


def local_shard(
    parameter: nn.Parameter, parts: Iterable[tuple[int, Tensor]], grid: Grid, replicated: bool
) -> Tensor:
    """The flat tensor-parallel shard of this process, assembled over its data-parallel group.

    Args:
        parts: (offset, values) of the parts that this process owns; there may be none.
        replicated: every data-parallel process owns all of it (ZeRO 0): nothing is sent.
    """
    shape = local_shape(parameter)
    flat = torch.zeros(shape.numel(), device=grid.device)
    for offset, values in parts:
        flat[offset : offset + values.numel()] = values
    if grid.data > 1 and not replicated:
        dist.all_reduce(flat, group=grid.data_group)
    return flat


def whole_tensor(parameter: nn.Parameter, flat: Tensor, grid: Grid) -> Tensor:
    """The global tensor from the flat local shards of the tensor-parallel group."""
    info, shard = info_of(parameter), flat.view(local_shape(parameter))
    if info.partition_dim is None or grid.tensor == 1:
        return shard
    parts = [torch.empty_like(shard) for _ in range(grid.tensor)]
    dist.all_gather(parts, shard.contiguous(), group=grid.tensor_group)
    return torch.cat(parts, info.partition_dim)


def own_shard(parameter: nn.Parameter, whole: Tensor, grid: Grid) -> Tensor:
    """This process's flat tensor-parallel shard of a global tensor."""
    dim = info_of(parameter).partition_dim
    if dim is not None and grid.tensor > 1:
        whole = whole.chunk(grid.tensor, dim)[grid.tensor_rank]
    return whole.reshape(-1)


def place_in_stage(grid: Grid) -> int:
    """Number of this process among those with the same layers."""
    return grid.data_rank * grid.tensor + grid.tensor_rank


def batched(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Up to ``size`` items at a time, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def shard_from(place: int, whole: Tensor | None, parameter: nn.Parameter, grid: Grid) -> Tensor:
    """This process's flat tensor-parallel shard of a tensor that one process of the stage has.

    That process sends the tensor to its tensor-parallel group, whose members each send their shard
    to their data-parallel group.

    Args:
        place: of that process, as `place_in_stage`.
        whole: the global tensor there; ignored on other processes.
    """
    data_rank, tensor_rank = divmod(place, grid.tensor)

    def rank(data: int, tensor: int) -> int:
        return grid.global_rank(pipeline=grid.pipeline_rank, data=data, tensor=tensor)

    flat = torch.empty(local_shape(parameter).numel(), device=grid.device)
    if grid.data_rank == data_rank:
        if grid.tensor_rank != tensor_rank or whole is None:
            whole = torch.empty(info_of(parameter).shape, device=grid.device)
        if grid.tensor > 1:
            dist.broadcast(whole, rank(data_rank, tensor_rank), group=grid.tensor_group)
        flat = own_shard(parameter, whole, grid)
    if grid.data > 1:
        dist.broadcast(flat, rank(data_rank, grid.tensor_rank), group=grid.data_group)
    return flat


def sum_over_stage(values: Tensor, grid: Grid, replicated: bool) -> Tensor:
    """Sum over the processes that share a stage's tensors, in place."""
    if grid.data > 1 and not replicated:
        dist.all_reduce(values, group=grid.data_group)
    if grid.tensor > 1:
        dist.all_reduce(values, group=grid.tensor_group)
    return values
