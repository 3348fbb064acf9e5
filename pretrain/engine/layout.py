"""How a recipe divides its model and its batch among processes that need not exist."""

from __future__ import annotations

import torch

from pretrain.config.recipe import Config
from pretrain.distributed.grid import Grid, check_grid
from pretrain.engine.engine import micro_batches
from pretrain.engine.precision import with_precision
from pretrain.engine.sizes import Layout
from pretrain.engine.speed import recomputes_selectively, records_passes


def empty_grid(config: Config, device: str, count: int) -> Grid:
    """The first process of a recipe's grid, without its groups.

    Raises:
        UsageError: if the grid does not fill the devices.
    """
    data = check_grid(config.grid, count)
    tensor, pipeline = config.grid.tensor_parallel, config.grid.pipeline_parallel
    sequence = config.grid.sequence_parallel and tensor > 1
    return Grid(tensor, pipeline, data, 0, torch.device(device), None, None, None, sequence)


def layout_of(config: Config, device: str, count: int, base: float, slack: float) -> Layout:
    """How a recipe is divided among ``count`` devices.

    Args:
        device: their type (cuda, cpu).
        base, slack: of a process, from `memory.process_bytes`.

    Raises:
        UsageError: if its grid does not use all devices, or cannot divide the batch.
    """
    grid = empty_grid(config, device, count)
    micro, passes = micro_batches(config, grid)
    stage = config.grid.zero_stage
    zero = config.deepspeed.get("zero_optimization") or {}
    # As in a long run on a GPU (`pretrain.engine.speed`).
    compiled = config.speed.compile is not False and device == "cuda" and stage < 3
    compiled = compiled and grid.tensor == 1
    return Layout(
        width=2 if with_precision(config, grid.device).precision == "bf16" else 4,
        tensor=grid.tensor,
        pipeline=grid.pipeline,
        data=grid.data,
        stage=stage,
        micro=micro,
        count=passes,
        recompute=config.grid.activation_checkpointing,
        selective=recomputes_selectively(config, device),
        flat=config.is_flat,
        recorded=records_passes(config, grid),
        sequence=grid.sequence_parallel,
        loss_bytes=config.speed.loss_bytes(device, compiled),
        compiled_loss=compiled,
        norms=0 < config.norms_every <= config.train.steps,
        live=zero.get("stage3_max_live_parameters", 1e9),
        reuse=zero.get("stage3_max_reuse_distance", 1e9),
        base=base,
        slack=slack,
    )
