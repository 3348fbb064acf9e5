"""Masters and working weights of a new engine, on every grid and ZeRO stage."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.tools import base_recipe, run_workers

GRIDS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{"tensor_parallel": 2}, {"pipeline_parallel": 2}, {}],
    4: [{"tensor_parallel": 2}, {"pipeline_parallel": 2},
        {"tensor_parallel": 2, "pipeline_parallel": 2}],
}  # fmt: skip


def cases(processes: int, data: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for grid in GRIDS[processes]:
        for stage in (0, 1, 2, 3):
            for precision in ("fp32", "bf16"):
                for update in ("flat", "deepspeed"):
                    pipeline = "pipeline_parallel" in grid
                    is_flat = stage < 2 and not pipeline
                    if (pipeline and stage > 1) or (update == "flat" and not is_flat):
                        continue
                    if stage == 0 and precision == "bf16" and update == "deepspeed":
                        continue  # refused
                    values = deepcopy(base_recipe(data))
                    values["model"]["vocabulary_size"] = 90
                    values["model"]["tied_head"] = len(found) % 2 == 0
                    values["grid"] = grid | {"zero_stage": stage}
                    values["precision"] = precision
                    values["speed"] = {"update": update if is_flat else "auto"}
                    found.append({"recipe": values})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processes", GRIDS)
def test_every_engine_begins_with_the_same_weights(
    processes: int, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In the short form of two of three cases of each grid."""
    asked = cases(processes, data)
    if not request.config.getoption("--long"):
        asked = [case for number, case in enumerate(asked) if number % 3 != 1]
    answers = run_workers(processes, "initial", asked, tmp_path)
    for case, answer in zip(asked, answers, strict=True):
        grid = case["recipe"]["grid"], case["recipe"]["precision"], case["recipe"]["speed"]
        assert answer["masters"] == 0.0 and answer["working"] == 0.0, (grid, answer)
        assert answer["elements"] >= answer["parameters"], (grid, answer)
        # While ZeRO 3 builds, at most a layer is whole, besides small tensors that stay so.
        if grid[0]["zero_stage"] == 3 and processes > 1:
            assert 0 < answer["held"] <= answer["largest layer"] + answer["small"], (grid, answer)
            assert answer["gathers"] == 0, (grid, answer)
