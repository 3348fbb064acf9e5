"""Checkpoints by time, beside those by steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoint.reader import CHECKPOINTS, list_checkpoints, step_of
from pretrain.distributed.signals import StopSignals
from tests.tools import base_recipe, run_workers


@pytest.mark.slow
def test_minutes_add_checkpoints(data: Path, tmp_path: Path) -> None:
    """Every step is late after no time, none after a year; those of the steps stay."""
    cases = []
    for name, minutes in (("never", 0.0), ("at once", 1e-9), ("in a year", 5e5)):
        recipe = base_recipe(data)
        recipe["checkpoint"] = {"every": 4, "keep": 0, "minutes": minutes}
        cases.append({"recipe": recipe, "run": str(tmp_path / name)})
    run_workers(1, "train", cases, tmp_path / "workers")
    saved = {
        name: [step_of(one) for one in list_checkpoints(tmp_path / name / CHECKPOINTS)]
        for name in ("never", "at once", "in a year")
    }
    assert saved == {"never": [4, 6], "at once": [1, 2, 3, 4, 5, 6], "in a year": [4, 6]}


def test_one_late_process_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """All save if one is late, and stop only if one was asked to."""
    others: list[int] = []

    def all_reduce(flags: torch.Tensor, op: Any) -> None:
        assert op == dist.ReduceOp.MAX
        flags.copy_(torch.maximum(flags, torch.tensor(others)))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    grid: Any = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    signals = StopSignals()
    for others[:] in ([0, 0], [0, 1], [1, 0]):
        assert signals.agreed_with(grid, False) == (bool(others[0]), bool(others[1]))
        assert signals.agreed_with(grid, True) == (bool(others[0]), True)
        assert signals.agreed(grid) is bool(others[0])
