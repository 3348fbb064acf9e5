"""A checkpoint into a model or an engine, on any grid."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.roles import ParameterInfo, declared_parameters, info_of
from pretrain.checkpoint.manifest import MASTER
from pretrain.checkpoint.reader import Checkpoint
from pretrain.distributed.grid import Grid
from pretrain.engine.engine import Engine
from pretrain.engine.masters import local_shape, prepare_moments, write_back
from pretrain.engine.optimizers import rule_of


@torch.no_grad()
def load_into_engine(checkpoint: Checkpoint, engine: Engine) -> None:
    """Set masters, moments and working weights of every process from ``checkpoint``.

    λ is not restored here: it comes from the plan, and `Engine.audit_decay` checks it.
    """
    grid = engine.grid
    masters = restore_weights(checkpoint, engine.module, grid)
    owned = {id(fragment.parameter): fragment for fragment in engine.fragments()}
    for parameter, values in masters:
        fragment = owned.get(id(parameter))
        if fragment is None:
            continue
        stop = fragment.offset + fragment.master.numel()
        fragment.master.copy_(values[fragment.offset : stop])
        keys = _moments(checkpoint, fragment.info, engine.config.optimizer.name)
        if keys:
            prepare_moments(fragment, keys, checkpoint.taken)
        views = fragment.moments()
        for key in keys:
            whole = checkpoint.local(fragment.info, key, grid.tensor_rank, grid.tensor)
            views[key].copy_(whole[fragment.offset : stop])
    state = checkpoint.rng_state(grid.rank)
    if state is not None:
        torch.set_rng_state(state)


def _moments(checkpoint: Checkpoint, info: ParameterInfo, optimizer: str) -> tuple[str, ...]:
    """Keys of the moments that ``optimizer`` can use: none of another update rule."""
    if rule_of(checkpoint.config.optimizer.name, info.role) != rule_of(optimizer, info.role):
        return ()
    return tuple(key for key in checkpoint.keys(info.name) if key != MASTER)


def restore_weights(
    checkpoint: Checkpoint, module: nn.Module, grid: Grid
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Set the working weights of this process's part of the model, one parameter at a time.

    Yields:
        Each parameter with its local shard, flat float32, for restoring masters too.
    """
    for parameter in declared_parameters(module):
        values = checkpoint.local(info_of(parameter), MASTER, grid.tensor_rank, grid.tensor)
        assert values.numel() == local_shape(parameter).numel()
        with torch.no_grad():
            write_back(parameter, values)
        yield parameter, values


def load_into_module(checkpoint: Checkpoint, module: nn.Module, grid: Grid) -> None:
    """Set the working weights of this process's part of the model."""
    for _ in restore_weights(checkpoint, module, grid):
        pass
