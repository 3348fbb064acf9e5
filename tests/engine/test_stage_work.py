"""Work on whole matrices is divided among the processes of a stage, and they do it at once."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tools import base_recipe, run_workers

LAYERS, STEPS = 4, 3
GRIDS: dict[int, list[dict[str, Any]]] = {
    2: [{"zero_stage": 1}, {"zero_stage": 0}, {"tensor_parallel": 2}, {"zero_stage": 3}],
    4: [
        {"tensor_parallel": 2, "zero_stage": 1},
        {"tensor_parallel": 2, "zero_stage": 2},
        {"tensor_parallel": 2, "pipeline_parallel": 2},
        {"pipeline_parallel": 2, "zero_stage": 1},
        {"zero_stage": 1},
        {"tensor_parallel": 4},
    ],
}


def case(data: Path, grid: dict[str, Any], folder: Path) -> dict[str, Any]:
    recipe = deepcopy(base_recipe(data))
    recipe["model"] |= {"num_layers": LAYERS}
    recipe["train"] = {"steps": STEPS, "global_batch": 8, "micro_batch": 2}
    recipe["optimizer"] |= {"name": "muon"}
    recipe["grid"] = grid
    folder.mkdir(parents=True)
    return {"recipe": recipe, "meet": str(folder)}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_each_matrix_once(
    data: Path, tmp_path: Path, processes: int, request: pytest.FixtureRequest
) -> None:
    """Muon makes every matrix on one process, and all numbers are those of one process; figures of
    a policy are computed on all processes of a stage at once."""
    (alone,) = run_workers(1, "stage_work", [case(data, {}, tmp_path / "m")], tmp_path / "w")
    assert alone["orthogonalised"] == [STEPS * LAYERS * 6] and len(alone["figures"]) == LAYERS
    grids = GRIDS[processes][:: 1 if request.config.getoption("--long") else 2]
    cases = [case(data, grid, tmp_path / str(i)) for i, grid in enumerate(grids)]
    for one, found in zip(
        cases, run_workers(processes, "stage_work", cases, tmp_path / "w"), strict=True
    ):
        grid = one["recipe"]["grid"]
        assert sum(found["orthogonalised"]) == STEPS * LAYERS * 6, grid
        assert len(set(found["orthogonalised"])) == 1, grid
        np.testing.assert_allclose(found["losses"], alone["losses"], rtol=1e-5)
        assert found["figures"].keys() == alone["figures"].keys()
        for name, value in alone["figures"].items():
            assert found["figures"][name] == pytest.approx(value, rel=1e-5), (grid, name)
        assert found["together"], grid
