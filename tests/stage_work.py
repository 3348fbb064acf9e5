"""Which process of a stage makes which matrix, for tests/engine/test_stage_work.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.dataset import TrainingData
from models.roles import ParameterInfo, Role
from pretrain.config.recipe import Config
from pretrain.distributed.grid import Grid
from pretrain.engine import shrink
from pretrain.engine.engine import build_engine
from pretrain.engine.optimizers import muon_update
from pretrain.tasks.text import Text
from pretrain.training.loader import Loader
from pretrain.training.setup import prepare

_PATIENCE = 20.0


class Meeting:
    """Stands for a policy: its figure of a query matrix waits until every process of the stage
    computes one."""

    def __init__(self, folder: Path, grid: Grid) -> None:
        self.folder, self.grid = folder, grid
        self.calls, self.together = 0, True

    def measures(self, info: ParameterInfo) -> bool:
        return info.role is Role.QUERY

    def figure(self, info: ParameterInfo, matrix: torch.Tensor) -> float:
        grid, name = self.grid, f"{self.grid.pipeline_rank}-{self.calls}"
        self.calls += 1
        (self.folder / f"{name}-{grid.rank}").touch()
        until = time.monotonic() + _PATIENCE
        while len(list(self.folder.glob(f"{name}-*"))) < grid.tensor * grid.data:
            if time.monotonic() > until:
                self.together = False
                break
            time.sleep(0.01)
        return float(matrix.double().square().sum())


def run_stage_work(case: dict[str, Any], grid: Grid, config: Config) -> dict[str, Any]:
    """Some updates of Muon, then the figures of a policy.

    Returns:
        The number of matrices that each process orthogonalised, losses, figures, and whether the
        processes of a stage computed figures at once.
    """
    setup = prepare(config, grid.tensor)
    engine = build_engine(setup.config, grid, setup.plan)
    assert isinstance(setup.task, Text)
    samples = config.train.steps * config.train.global_batch
    data = TrainingData(setup.task.manifest, "proportional", config.model.context, 1, samples)
    micro = config.train.global_batch // grid.data // engine.micro_batches
    loader = Loader(data, grid, config.train.global_batch, micro, 0, 0)
    made, losses = [], []
    orthogonal = muon_update

    def counted(momentum: torch.Tensor) -> torch.Tensor:
        made.append(tuple(momentum.shape))
        return orthogonal(momentum)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shrink, "muon_update", counted)
        for step in range(config.train.steps):
            engine.begin_step(step, 3e-3)
            losses.append(engine.train_step(loader))
    meeting = Meeting(Path(case["meet"]), grid)
    figures = engine.shrinker.figures(meeting)  # type: ignore[arg-type]
    engine.close()
    found = grid.gather((len(made), meeting.together))
    return {
        "orthogonalised": [count for count, _ in found],
        "together": all(together for _, together in found),
        "losses": losses,
        "figures": figures,
    }
