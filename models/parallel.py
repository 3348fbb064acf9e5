"""Tensor and sequence parallelism of single operations.

Activations have the layout ``[sequence, batch, hidden]``, as in Megatron, because sequence
parallelism splits the first dimension. Sums over the group use Megatron-core's mappings. The
sequence is gathered and split by PyTorch's functional collectives where it is compiled: Megatron's
own write into a tensor that they allocate, which torch 2.11 compiles to wrong gradients. Elsewhere
it is not: with gloo, the functional ones overwrite memory after some ten thousand calls (torch
2.13: a segmentation fault, or a thread that waits for ever).
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.wide_sums import embedding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class TensorParallel:
    """This process's place in its tensor-parallel group; the default is an undivided model."""

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    sequence_parallel: bool = False
    """Split activations between the tensor-parallel blocks along the sequence."""

    @property
    def name(self) -> str:
        """The group's name, as PyTorch registers it."""
        assert self.group is not None
        return str(self.group.group_name)


@cache
def megatron_module(module: str) -> Any:
    """Import a module of `megatron.core.tensor_parallel` late (it takes 3 s), and without its
    warnings about optional GPU packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"megatron.core.tensor_parallel.{module}")


def enter(x: Tensor, tp: TensorParallel) -> Tensor:
    """Prepare ``x`` for a column-parallel product: gather the sequence, or reduce the gradient."""
    if tp.size == 1:
        return x
    if tp.sequence_parallel:
        whole: Tensor = _Gather.apply(x, _handle(tp), tp.size)  # type: ignore[no-untyped-call]
        return whole
    copied: Tensor = megatron_module("mappings").copy_to_tensor_model_parallel_region(
        x, group=tp.group
    )
    return copied


def leave(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sum the partial results of a row-parallel product over the group."""
    if tp.size == 1:
        return x
    if tp.sequence_parallel:
        part: Tensor = _SumAndSplit.apply(x, _handle(tp), tp.size)  # type: ignore[no-untyped-call]
        return part
    total: Tensor = megatron_module("mappings").reduce_from_tensor_model_parallel_region(
        x, group=tp.group
    )
    return total


def sum_gradient(weight: Tensor, tp: TensorParallel) -> Tensor:
    """Identity whose gradient is summed over the group.

    It is for a replicated weight that does a part of the work on each process (other heads, or
    other positions of the sequence): without the sum the replicas would drift apart.
    """
    if tp.size == 1:
        return weight
    copied: Tensor = megatron_module("mappings").copy_to_tensor_model_parallel_region(
        weight, group=tp.group
    )
    return copied


def replicated(weight: Tensor, tp: TensorParallel) -> Tensor:
    """A replicated weight used between the parallel blocks, where sequence parallelism splits."""
    return sum_gradient(weight, tp) if tp.sequence_parallel else weight


def embed(tokens: Tensor, weight: Tensor, tp: TensorParallel) -> Tensor:
    """Look up a vocabulary-parallel embedding.

    Args:
        tokens: ``[sequence, batch]`` integers.
        weight: this process's ``[vocabulary / size, hidden]`` rows.

    Returns:
        ``[sequence, batch, hidden]``, or this process's part of the sequence.
    """
    if tp.size == 1:
        return embedding(tokens, weight)
    start = tp.rank * weight.shape[0]
    local = tokens - start
    outside = (local < 0) | (local >= weight.shape[0])
    rows = embedding(local.masked_fill(outside, 0), weight)
    return leave(rows.masked_fill(outside.unsqueeze(-1), 0.0), tp)


class _Gather(torch.autograd.Function):
    """The whole sequence from every process's part; its gradient is summed and split."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Handle, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _gathered(x, group, size)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        return _summed_and_split(upstream[0], ctx.group, ctx.size), None, None


class _SumAndSplit(torch.autograd.Function):
    """This process's part of the sum over the group; its gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Handle, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _summed_and_split(x, group, size)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        return _gathered(upstream[0], ctx.group, ctx.size), None, None


Handle = Any
"""A process group for eager code, its name for compiled code."""


def _handle(tp: TensorParallel) -> Handle:
    return tp.name if torch.compiler.is_compiling() else tp.group


def _gathered(x: Tensor, group: Handle, size: int) -> Tensor:
    if not isinstance(group, str):
        whole = x.new_empty(size * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
        return whole
    pending = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group)
    done: Tensor = torch.ops._c10d_functional.wait_tensor(pending)
    return done


def _summed_and_split(x: Tensor, group: Handle, size: int) -> Tensor:
    if not isinstance(group, str):
        part = x.new_empty(x.shape[0] // size, *x.shape[1:])
        dist.reduce_scatter_tensor(part, x.contiguous(), group=group)
        return part
    pending = torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", size, group)
    done: Tensor = torch.ops._c10d_functional.wait_tensor(pending)
    return done
