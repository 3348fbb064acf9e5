"""Detects memory that fails silently: compares copies of weights that should be equal in every bit.

Data-parallel processes hold the same working weights (ZeRO 0-2). Sums of their bits are compared,
which takes a few bytes per parameter; a flipped bit in any copy changes its sum.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import nn

from models.roles import declared_parameters, info_of
from pretrain.distributed.grid import Grid

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def are_replicated(grid: Grid, zero_stage: int) -> bool:
    """Whether weights have copies to compare."""
    return grid.data > 1 and zero_stage < 3


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
    mine = bit_sums(module)
    copies = [torch.empty_like(mine) for _ in range(grid.data)]
    dist.all_gather(copies, mine, group=grid.data_group)
    table = torch.stack(copies).tolist()
    difference = ""
    for number, parameter in enumerate(declared_parameters(module)):
        values = [row[number] for row in table]
        if len(set(values)) > 1:
            difference = f"{info_of(parameter).name} differs {_odd_ones(values, grid)}"
            break
    return next((text for text in grid.gather(difference) if text), "")


def _odd_ones(values: list[int], grid: Grid) -> str:
    ranks = [
        grid.global_rank(pipeline=grid.pipeline_rank, data=data, tensor=grid.tensor_rank)
        for data in range(grid.data)
    ]
    (usual, count), *_ = Counter(values).most_common()
    if 2 * count <= len(values):  # it is not known which copy is right
        return f"between process ranks {', '.join(map(str, ranks))}"
    odd = [str(rank) for rank, value in zip(ranks, values, strict=True) if value != usual]
    return f"on process rank {', '.join(odd)} from the others"
