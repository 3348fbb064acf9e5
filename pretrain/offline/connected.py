"""Connects the processes of a command that works on stored models."""

from __future__ import annotations

from pretrain.config.recipe import Config
from pretrain.distributed.grid import Grid, build_grid, check_grid, connect, process_count
from pretrain.engine.deepspeed_adapter import prepare_deepspeed
from pretrain.engine.libraries import load_libraries
from pretrain.engine.speed import keep_freed_memory


def open_grid(config: Config) -> Grid:
    """The grid of a recipe on the processes that were started; a collective call.

    Raises:
        UsageError: if the grid does not use all processes.
    """
    check_grid(config.grid, process_count())
    device = connect()
    keep_freed_memory(device)
    load_libraries()
    prepare_deepspeed()
    return build_grid(config.grid, device)
