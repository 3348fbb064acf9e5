"""Checkpoints of any grid on any other: training and evaluation go on as if they had stayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.checkpoint.reader import Checkpoint, list_checkpoints
from tests.decay.test_decay_applied import decays
from tests.tools import (
    DIALECTS,
    base_recipe,
    losses_of,
    metrics_of,
    pretrain,
    run,
    run_workers,
    weights_of,
    write_recipe,
)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run on one process and on two pipeline stages."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp("undisturbed")
        values = base_recipe(data)
        values["train"]["steps"] = 10
        values["checkpoint"]["every"] = 4
        values["grid"] = {"pipeline_parallel": processes}
        recipe = write_recipe(folder / "recipe.yaml", values)
        done = pretrain("train", str(recipe), "--out", str(folder / "run"), processes=processes)
        assert done.returncode == 0, done.stderr
        found[processes] = folder / "run"
    return found


@pytest.mark.slow
def test_goes_on_on_another_grid(data: Path, tmp_path: Path, undisturbed: dict[int, Path]) -> None:
    """A checkpoint of two pipeline stages is read by one process."""
    a, b = weights_of(undisturbed[2]), weights_of(undisturbed[1])
    assert a.keys() == b.keys()
    for name, value in b.items():
        if "key.bias" in name or not name.endswith("master"):
            continue  # softmax ignores a key bias: its gradient is rounding noise
        scale = np.abs(value).max() + 1e-12
        assert np.abs(a[name] - value).max() / scale < 1e-3, name
    target = str(undisturbed[2])
    done = pretrain("evaluate", target, "--split", "val", "--out", str(tmp_path / "e.json"))
    assert done.returncode == 0, done.stderr


GRIDS = (
    (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    (4, {"pipeline_parallel": 2}),  # and two data-parallel ranks
    (2, {"tensor_parallel": 2, "zero_stage": 1}),
    (1, {"zero_stage": 3}),
    (2, {"zero_stage": 1}),
)
"""Processes and grid of each leg of a run that moves."""
LEG = 2


@pytest.mark.slow
def test_a_run_moves_between_grids(
    data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Five grids, `LEG` steps on each: the losses of a run that stayed, and every λ its role's.

    After each move, steps with zero gradients on the new grid show what decay does to each tensor
    of one of the models. The short form has one model, with fewer keys than queries.
    """
    recipes = {}
    for dialect in DIALECTS if request.config.getoption("--long") else ("llama",):
        recipes[dialect] = base_recipe(data)
        recipes[dialect]["model"] |= DIALECTS[dialect]
        recipes[dialect]["train"]["steps"] = LEG * len(GRIDS)
        recipes[dialect]["checkpoint"] = {"every": LEG, "keep": 0}
        recipes[dialect]["ranks"] = {"every": LEG * len(GRIDS)}
        recipes[dialect]["evaluation"] = {
            "every": LEG * len(GRIDS), "documents": 1, "batch": 24, "at_end": "none"
        }  # fmt: skip
    still = [
        {"recipe": recipe, "run": str(tmp_path / f"{name}-still")}
        for name, recipe in recipes.items()
    ]
    run_workers(1, "train", still, tmp_path / "w")
    for leg, (processes, grid) in enumerate(GRIDS):
        cases: list[dict[str, Any]] = []
        looked_at = list(recipes)[leg % len(recipes)]
        for name, recipe in recipes.items():
            moved = {**recipe, "grid": grid}
            run = tmp_path / name
            if leg and name == looked_at:
                checkpoint = run / f"checkpoints/step-{LEG * leg:08d}"
                weight_decay = recipe["optimizer"]["weight_decay"]
                cases.append({"task": "decay", "recipe": moved, "checkpoint": str(checkpoint),
                              "decays": decays(weight_decay)})  # fmt: skip
            cases.append({"recipe": moved, "run": str(run), "stop": LEG * (leg + 1)})
        answers = run_workers(processes, "train", cases, tmp_path / "w")
        for case, answer in zip(cases, answers, strict=True):
            if case.get("task") == "decay":
                assert answer["worst"] < 1e-6, (grid, answer)
    for name in recipes:
        mine, other = tmp_path / name, tmp_path / f"{name}-still"
        steps = list(range(1, LEG * len(GRIDS) + 1))
        assert [r["step"] for r in metrics_of(mine) if r["kind"] == "train"] == steps
        np.testing.assert_allclose(losses_of(mine), losses_of(other), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["grid.pipeline_parallel=2", "grid.tensor_parallel=2"])
def test_evaluation_of_a_checkpoint_on_another_grid(
    undisturbed: dict[int, Path], tmp_path: Path, grid: str
) -> None:
    target, out = str(undisturbed[1]), tmp_path / "e.json"
    words = ["evaluate", target, grid, "--split", "val", "--out", str(out)]
    done = pretrain(*words, processes=2)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    done = pretrain("evaluate", target, "--split", "val", "--json", "--out", str(tmp_path / "1"))
    wanted = json.loads(done.stdout)
    assert found["documents_sha256"] == wanted["documents_sha256"]
    assert abs(found["overall"]["loss"] / wanted["overall"]["loss"] - 1) < 1e-5


def test_the_generator_of_torch_begins_with_the_seed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy or optimizer of a user's own may draw from it."""
    states = []
    for place in ("one", "other"):
        torch.manual_seed(len(place))
        values = base_recipe(data) | {"train": {"steps": 1, "global_batch": 8}}
        recipe = write_recipe(tmp_path / f"{place}.yaml", values)
        assert run(monkeypatch, "train", str(recipe), "--out", str(tmp_path / place)) == 0
        checkpoint = Checkpoint(list_checkpoints(tmp_path / place / "checkpoints")[-1])
        states.append(checkpoint.rng_state(0))
    assert states[0] is not None and states[1] is not None
    assert torch.equal(states[0], states[1])


def test_finished_run_is_left_alone(undisturbed: dict[int, Path], data: Path) -> None:
    run = undisturbed[1]
    before = metrics_of(run)
    done = pretrain("train", str(run.parent / "recipe.yaml"), "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert metrics_of(run) == before
    assert len(json.loads((run / "environment.json").read_text())) == 1
