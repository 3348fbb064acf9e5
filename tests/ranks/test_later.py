"""Measurements that are finished while training continues have the rows of those that it waits for.

A GPU begins the next update early, which is what this depends on; here a CPU does so.
"""

from __future__ import annotations

import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import pretrain.ranks.later
from pretrain.runs.folder import read_ranks
from pretrain.runs.metrics import read_metrics
from pretrain.training.faults import FaultDetector, GoBackError
from tests.ahead import looking_ahead
from tests.tools import base_recipe, run, run_workers, weights_of, write_recipe

STEPS = 10
GRIDS = {1: [(1, 0)], 2: [(1, 1), (2, 0)], 4: [(2, 1)]}
"""Tensor parallelism and ZeRO stage, by number of processes."""


def recipe_of(data: Path, tensor: int, stage: int, rng: random.Random) -> dict[str, Any]:
    """Any intervals, with and without a policy that wants ranks, checkpoints and evaluations."""
    recipe = deepcopy(base_recipe(data))
    recipe["model"] |= rng.choice([{}, {"dialect": "llama", "num_key_value_heads": 2}])
    recipe["train"]["steps"] = STEPS
    recipe["grid"] = {"tensor_parallel": tensor, "zero_stage": stage}
    recipe["ranks"] = {"every": rng.choice([1, 2, 3, 5]), "spectra": True}
    recipe["checkpoint"] = {"every": rng.choice([2, 4, 5, 7]), "keep": 0}
    recipe["evaluation"]["every"] = rng.choice([4, 6])
    if (tensor, stage) == (2, 0):
        recipe["optimizer"]["weight_decay"]["policies"] = [
            {"kind": "rank_target", "target": 0.5, "every": rng.choice([3, 4])}
        ]
    return recipe


def lines_of(run: Path) -> list[dict[str, Any]]:
    """What was measured, by step; the seconds differ."""
    rows = read_metrics(run, "ranks")
    return sorted(({**row, "seconds": 0} for row in rows), key=lambda row: row["step"])


@pytest.mark.parametrize(
    "processes", [2, *(pytest.param(processes, marks=pytest.mark.long) for processes in (1, 4))]
)
def test_rows_are_those_of_training_that_waits(processes: int, data: Path, tmp_path: Path) -> None:
    """Undisturbed, or killed after a checkpoint and continued."""
    rng, cases = random.Random(processes), []
    for number, (tensor, stage) in enumerate(GRIDS[processes]):
        recipe = recipe_of(data, tensor, stage, rng)
        for ahead in (False, True):
            case = {"recipe": recipe, "run": str(tmp_path / f"{number}-{ahead}"), "ahead": ahead}
            if number % 2:
                cases.append({**case, "stop": recipe["checkpoint"]["every"]})
            cases.append(case)
    answers = run_workers(processes, "train", cases, tmp_path / "workers")
    assert any(answers) and not any(
        steps for case, steps in zip(cases, answers, strict=True) if not case["ahead"]
    )
    for number in range(len(GRIDS[processes])):
        compare(tmp_path / f"{number}-False", tmp_path / f"{number}-True")


def compare(waits: Path, later: Path) -> None:
    for read in (read_ranks, lines_of):
        assert read(waits) and repr(read(later)) == repr(read(waits))  # a NaN is not itself
    weights = weights_of(later)
    assert all((values == weights[name]).all() for name, values in weights_of(waits).items())


@pytest.mark.parametrize(
    "fault", [4, 5, *(pytest.param(fault, marks=pytest.mark.long) for fault in (3, 8))]
)
def test_a_run_that_goes_back_measures_again(
    fault: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is unfinished at that moment."""
    recipe = recipe_of(data, 1, 1, random.Random(1))
    recipe["optimizer"]["weight_decay"].pop("policies", None)
    recipe["checkpoint"]["every"], recipe["ranks"]["every"] = 2, 1 + fault % 3
    path, plain = write_recipe(tmp_path / "recipe.yaml", recipe), FaultDetector.observe
    for name, ahead in (("waits", False), ("later", True)):
        faults = [GoBackError(fault, "a fault", ())]

        def observe(judge: Any, step: int, *given: Any, faults: Any = faults) -> str:
            if step == fault and faults:
                raise faults.pop()
            return plain(judge, step, *given)

        monkeypatch.setattr(FaultDetector, "observe", observe)
        with looking_ahead(ahead) as steps:
            words = ["train", str(path), "--out", str(tmp_path / name)]
            assert run(monkeypatch, *words) == 0 and not faults
        assert bool(steps) == ahead
    compare(tmp_path / "waits", tmp_path / "later")


def test_a_measurement_that_fails_ends_the_run_with_its_reason(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("LAPACK gives up")

    monkeypatch.setattr(pretrain.ranks.later, "rows_of", fail)
    recipe = recipe_of(data, 1, 0, random.Random(1))
    recipe["optimizer"]["weight_decay"].pop("policies", None)
    words = [str(write_recipe(tmp_path / "recipe.yaml", recipe)), "--out", str(tmp_path / "run")]
    with looking_ahead() as steps:
        assert run(monkeypatch, "train", *words) == 1
    assert steps
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: step {steps[0]}: ranks could not be measured: LAPACK gives up"
