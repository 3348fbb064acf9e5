"""One process of a grid whose other processes are simulated.

PyTorch's ``fake`` process group answers every collective at once, without values.
"""

from __future__ import annotations

import os
from typing import Any

import torch


def join_simulated_grid(recipe: dict[str, Any], processes: int) -> tuple[Any, Any, Any]:
    """Make this process rank 0 of a recipe's grid.

    Returns:
        The parsed recipe, the grid and the plan of decay: what `build_engine` takes.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from models.gpt import whole_model
    from pretrain.config.recipe import parse_config
    from pretrain.decay.plan import plan_decay
    from pretrain.distributed.grid import build_grid
    from pretrain.engine.libraries import load_libraries

    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": str(processes)}
    config = parse_config(recipe)
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    grid = build_grid(config.grid, torch.device("cpu"))
    load_libraries()
    infos = whole_model(config.model, grid.tensor)
    return config, grid, plan_decay(infos, config.optimizer.weight_decay)
