"""What only changes speed changes no number: compiled or not, by products or by SDPA, in parts."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from tests.tools import DIALECTS, base_recipe, check_theory, losses_of, run_workers

FAST = {"attention": "products", "compile": True}
PLAIN = {"attention": "sdpa", "compile": False}
GRIDS = {
    1: {"one": {}, "recompute": {"activation_checkpointing": True}},
    2: {
        "tensor": {"tensor_parallel": 2, "sequence_parallel": True},
        "pipeline": {"pipeline_parallel": 2},
        "zero-2": {"zero_stage": 2},
    },
}


def recipe_for(data: Path, dialect: str, precision: str, speed: dict, grid: dict) -> dict:
    values = deepcopy(base_recipe(data))
    values["model"] |= DIALECTS[dialect] | {"context": 160}  # two blocks of queries
    values["train"] = {"steps": 8, "global_batch": 8}
    values["precision"] = precision
    values["speed"], values["grid"] = speed, grid
    values["evaluation"]["every"] = values["ranks"]["every"] = values["checkpoint"]["every"] = 8
    return values


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Path]:
    """One run folder per (dialect, precision, speed, grid)."""
    folder = tmp_path_factory.mktemp("speed")
    found = {}
    for processes, grids in GRIDS.items():
        cases = []
        for dialect in ("gpt2", "llama"):
            for name, grid in grids.items():
                wanted = [("fp32", "fast")]
                if dialect == "llama" and name != "one":
                    continue  # the compiler takes its time
                if name == "one":
                    wanted += [("fp32", "plain"), ("bf16", "plain"), ("bf16", "fast")]
                for precision, kind in wanted:
                    speed = FAST if kind == "fast" else PLAIN
                    key = (dialect, precision, kind, name)
                    found[key] = folder / "-".join(key)
                    recipe = recipe_for(data, dialect, precision, speed, grid)
                    cases.append({"recipe": recipe, "run": str(found[key])})
        run_workers(processes, "train", cases, folder / f"workers-{processes}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_fast_paths_change_no_number(runs: dict[tuple, Path], dialect: str) -> None:
    wanted = losses_of(runs[dialect, "fp32", "plain", "one"])
    assert wanted[-1] < wanted[0] - 0.1
    for (one, precision, kind, name), run in runs.items():
        if one != dialect:
            continue
        rounding = 1e-4 if precision == "fp32" else 1e-2
        found = losses_of(run)
        np.testing.assert_allclose(found, wanted, rtol=rounding, err_msg=f"{kind} {name}")
        check_theory(run)
