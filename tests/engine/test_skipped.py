"""What of the optimizer a checkpoint hands on: after skipped updates, and to another rule."""

from __future__ import annotations

from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.roles import Role
from pretrain.checkpoint.reader import Checkpoint
from pretrain.engine.optimizers import rule_of
from tests.tools import base_recipe, losses_of, run_workers, weights_of

SAMPLE = [("adamw", 0), ("adamw", 1), ("adamw", 3), ("muon", 2)]
REST = [
    case for case in product(("adamw", "sgd", "muon"), (0, 1, 2, 3)) if case not in SAMPLE
]  # fmt: skip


def check(data: Path, folder: Path, kinds: list[tuple[str, int]]) -> None:
    cases, pairs = [], []
    for name, stage in kinds:
        recipe = deepcopy(base_recipe(data))
        recipe["optimizer"]["name"] = name
        recipe["grid"] = {"zero_stage": stage}
        recipe["ranks"]["every"] = recipe["evaluation"]["every"] = 6
        whole, cut = (folder / f"{name}-{stage}-{word}" for word in ("whole", "cut"))
        common: dict[str, Any] = {"recipe": recipe, "lost": [2, 3]}
        cases.append({**common, "run": str(whole)})
        cases.append({**common, "run": str(cut), "stop": 3})
        cases.append({**common, "run": str(cut)})
        pairs.append((whole, cut))
    run_workers(1, "train", cases, folder / "workers")
    for whole, cut in pairs:
        assert len(losses_of(whole)) == 4  # of six, two are skipped
        assert np.array_equal(losses_of(whole), losses_of(cut)), cut
        before, after = weights_of(whole), weights_of(cut)
        assert before.keys() == after.keys()
        for key in before:
            assert np.array_equal(before[key], after[key]), (cut, key)


@pytest.mark.slow
def test_resumed_after_skipped_updates(data: Path, tmp_path: Path) -> None:
    check(data, tmp_path, SAMPLE)


@pytest.mark.long
def test_resumed_after_skipped_updates_with_every_optimizer(data: Path, tmp_path: Path) -> None:
    check(data, tmp_path, REST)


def test_a_fork_takes_the_moments_of_its_own_rule_alone(data: Path, tmp_path: Path) -> None:
    """Every pair of optimizers: no error, and no moment that nothing will move again."""
    names: tuple[str, ...] = ("adamw", "sgd", "muon")
    cases: list[dict[str, Any]] = []
    own = {"adamw": {"exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}
    for name in names:
        recipe = deepcopy(base_recipe(data))
        recipe["optimizer"]["name"] = name
        recipe["ranks"]["every"] = recipe["evaluation"]["every"] = 6
        cases.append({"recipe": recipe, "run": str(tmp_path / name), "stop": 3})
    for before, after in product(names, names):
        recipe = deepcopy(cases[names.index(after)]["recipe"])
        fork = str(tmp_path / before / "checkpoints" / "step-00000003")
        out = str(tmp_path / f"{before}-{after}")
        cases.append({"recipe": recipe, "run": out, "fork": fork})
    run_workers(1, "train", cases, tmp_path / "workers")
    for before, after in product(names, names):
        run = tmp_path / f"{before}-{after}"
        assert len(losses_of(run)) == 3 and np.isfinite(losses_of(run)).all()
        for step in (3, 6):  # the fork's own first checkpoint, and the last
            checkpoint = Checkpoint(run / f"checkpoints/step-{step:08d}")
            for name, entry in checkpoint.parameters.items():
                rule = rule_of(after, Role(entry["role"]))
                known = own.get(rule, {"momentum_buffer"})
                dropped = step == 3 and rule != rule_of(before, Role(entry["role"]))
                assert set(checkpoint.keys(name)) == {"master"} | (set() if dropped else known)
