"""Detects memory that fails silently: compares copies of weights that should be equal in every bit.

Data-parallel processes hold the same working weights (ZeRO 0-2), and tensor-parallel processes the
same norms and biases. Sums of their bits are compared, which takes a few bytes per parameter; a
flipped bit in any copy changes its sum.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from models.roles import declared_parameters, info_of
from pretrain.distributed.grid import Grid

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def are_replicated(processes: int, zero_stage: int) -> bool:
    """Whether weights have copies on this number of processes that can be compared."""
    return processes > 1 and zero_stage < 3


@torch.no_grad()
def bit_sums(module: nn.Module) -> torch.Tensor:
    """``[parameters]`` int64: the sum of each parameter's bits as integers, modulo 2⁶⁴."""
    sums = [
        parameter.detach().view(_BITS[parameter.element_size()]).sum(dtype=torch.int64)
        for parameter in declared_parameters(module)
    ]
    return torch.stack(sums)


def disagreement(module: nn.Module, grid: Grid) -> str:
    """One line on which copies differ between data-parallel processes; empty if none.
    Collective."""
    return _difference(module, grid, "data")


def drift(module: nn.Module, grid: Grid) -> str:
    """The same for the parameters that tensor-parallel processes hold whole.

    Each of them updates its own copy with a gradient of its own, which should be equal in every
    bit.
    """
    return _difference(module, grid, "tensor")


def _difference(module: nn.Module, grid: Grid, axis: Literal["data", "tensor"]) -> str:
    mine = bit_sums(module)
    size, group = (
        (grid.data, grid.data_group) if axis == "data" else (grid.tensor, grid.tensor_group)
    )
    copies = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(copies, mine, group=group)
    table = torch.stack(copies).tolist()
    difference = ""
    for number, parameter in enumerate(declared_parameters(module)):
        if axis == "tensor" and info_of(parameter).partition_dim is not None:
            continue
        values = [row[number] for row in table]
        if len(set(values)) > 1:
            difference = f"{info_of(parameter).name} differs {_odd_ones(values, grid, axis)}"
            break
    return next((text for text in grid.gather(difference) if text), "")


def _odd_ones(values: list[int], grid: Grid, axis: Literal["data", "tensor"]) -> str:
    place = {"data": grid.data_rank, "tensor": grid.tensor_rank}
    ranks = [
        grid.global_rank(pipeline=grid.pipeline_rank, **(place | {axis: number}))
        for number in range(len(values))
    ]
    (usual, count), *_ = Counter(values).most_common()
    if 2 * count <= len(values):  # it is not known which copy is right
        return f"between process ranks {', '.join(map(str, ranks))}"
    odd = [str(rank) for rank, value in zip(ranks, values, strict=True) if value != usual]
    return f"on process rank {', '.join(odd)} from the others"
