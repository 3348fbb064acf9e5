"""A checkpoint into a model or an engine, on any grid."""

from __future__ import annotations

import torch
from torch import nn

from models.roles import ParameterInfo, declared_parameters, info_of
from pretrain.checkpoint.manifest import MASTER
from pretrain.checkpoint.reader import Checkpoint
from pretrain.distributed.grid import Grid
from pretrain.engine.engine import Engine
from pretrain.engine.masters import prepare_moments
from pretrain.engine.optimizers import rule_of


@torch.no_grad()
def load_into_engine(checkpoint: Checkpoint, engine: Engine) -> None:
    """Set masters, moments and working weights of every process from ``checkpoint``.

    A process reads only what its optimizer owns. λ is not restored here: it comes from the plan,
    and `Engine.audit_decay` checks it.
    """
    grid = engine.grid
    for fragment in engine.fragments():
        keys = _moments(checkpoint, fragment.info, engine.config.optimizer.name)
        if keys:
            prepare_moments(fragment, keys, checkpoint.taken)
        else:  # a run that goes back has those of later updates
            fragment.optimizer.state.pop(fragment.owner, None)
        moments = fragment.moments()
        for low, master in fragment.parts():
            high, start = low + master.numel(), low - fragment.offset
            for key in (MASTER, *keys):
                into = master if key == MASTER else moments[key][start : start + master.numel()]
                into.copy_(
                    checkpoint.part(fragment.info, key, grid.tensor_rank, grid.tensor, low, high)
                )
    engine.refresh()
    state = checkpoint.rng_state(grid.rank)
    if state is not None:
        torch.set_rng_state(state)


def _moments(checkpoint: Checkpoint, info: ParameterInfo, optimizer: str) -> tuple[str, ...]:
    """Keys of the moments that ``optimizer`` can use: none of another update rule."""
    if rule_of(checkpoint.config.optimizer.name, info.role) != rule_of(optimizer, info.role):
        return ()
    return tuple(key for key in checkpoint.keys(info.name) if key != MASTER)


@torch.no_grad()
def load_into_module(checkpoint: Checkpoint, module: nn.Module, grid: Grid) -> None:
    """Set the working weights of this process's part of the model, a parameter at a time."""
    for parameter in declared_parameters(module):
        values = checkpoint.local(info_of(parameter), MASTER, grid.tensor_rank, grid.tensor)
        parameter.data.view(-1).copy_(values)
