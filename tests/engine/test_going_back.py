"""A checkpoint without moments, read by an engine that has some, as after a fault in a fork."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.gpt import whole_model
from models.initial import Initial
from pretrain.checkpoint.restore import load_into_engine
from pretrain.config.recipe import parse_config
from pretrain.decay.plan import plan_decay
from pretrain.distributed.grid import Grid
from pretrain.engine.engine import Engine, build_engine
from tests.tools import base_recipe

GRID = Grid(1, 1, 1, 0, torch.device("cpu"), None, None, None)


def losses(engine: Engine, updates: int) -> list[float]:
    draw = torch.Generator().manual_seed(3)
    found = []
    for step in range(updates):
        tokens = torch.randint(0, 90, (8, 32), generator=draw)
        engine.begin_step(step, 1e-2)
        found.append(engine.train_step(iter([(tokens, tokens.roll(-1, 1))])))
    return found


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_moments_of_later_updates_are_dropped(name: str) -> None:
    values: dict[str, Any] = base_recipe(Path("data"))
    values["model"]["vocabulary_size"], values["precision"] = 90, "fp32"
    values["optimizer"]["name"] = name
    config = parse_config(values)
    infos = whole_model(config.model)

    def built() -> Engine:
        return build_engine(config, GRID, plan_decay(infos, config.optimizer.weight_decay))

    fresh, used = built(), built()
    initial: dict[str, Initial] = {
        one.info.name: one.parameter.initial  # type: ignore[attr-defined]
        for one in fresh.fragments()
    }
    checkpoint: Any = SimpleNamespace(
        config=config,
        taken=0,
        keys=lambda _: ["master"],
        rng_state=lambda _: None,
        part=lambda info, _, rank, size, low, high: initial[info.name].part(rank, size, low, high),
    )
    wanted = losses(fresh, 4)
    assert losses(used, 3) == wanted[:3]
    load_into_engine(checkpoint, used)
    assert losses(used, 4) == wanted
