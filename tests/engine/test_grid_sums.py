"""Micro batches and ranks are summed in float32: how many there are changes no gradient."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tools import base_recipe, by_form, run_workers, weights_of

BATCH = by_form(64, 128)
GRIDS = {
    # name: (processes, grid)
    **{f"zero-{stage}": (1, {"zero_stage": stage}) for stage in (1, 2, 3)},
    **{f"data-zero-{stage}": (2, {"zero_stage": stage}) for stage in (1, 2, 3)},
    "pipeline": (2, {"pipeline_parallel": 2}),
    "tensor": (2, {"tensor_parallel": 2, "sequence_parallel": True}),
}


def recipe_for(data: Path, precision: str, micro: int, grid: dict[str, Any]) -> dict[str, Any]:
    """One update of SGD, whose momentum is then the gradient of the whole batch."""
    values = deepcopy(base_recipe(data))
    # A tied head: under a pipeline two stages sum the gradient of one weight.
    values["model"] |= {"dialect": "llama", "tied_head": True, "context": 16}
    values["train"] = {"steps": 1, "global_batch": BATCH, "micro_batch": micro}
    values["precision"], values["grid"] = precision, grid
    values["optimizer"] = {"name": "sgd", "learning_rate": 1e-3, "gradient_clipping": 0}
    for section in ("ranks", "evaluation", "checkpoint"):
        values[section]["every"] = 1
    values["evaluation"] |= {"documents": 1, "at_end": "none"}
    return values


def gradients_of(run: Path) -> dict[str, np.ndarray]:
    suffix = "/momentum_buffer"
    return {
        name.removesuffix(suffix): values.astype(np.float64)
        for name, values in weights_of(run).items()
        if name.endswith(suffix)
    }


def error(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """Of each parameter, and of all, relative in norm."""
    assert found.keys() == wanted.keys() and len(wanted) == 2 * 9 + 2

    def norm(values: np.ndarray) -> float:
        return float(np.linalg.norm(values))

    each = {name: norm(found[name] - wanted[name]) / norm(wanted[name]) for name in wanted}
    whole = sum(norm(found[name] - wanted[name]) ** 2 for name in wanted) ** 0.5
    return each | {"all": whole / sum(norm(values) ** 2 for values in wanted.values()) ** 0.5}


@pytest.mark.slow
def test_many_micro_batches_are_one_large_batch(
    data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In the short form of the flat update, DeepSpeed's two kinds of sum, and each grid."""
    stages = (1, 2, 3) if request.config.getoption("--long") else (1, 3)
    grids = {name: grid for name, grid in GRIDS.items() if grid[1].get("zero_stage", 1) in stages}
    runs: dict[str, tuple[str, int, int, dict[str, Any]]] = {"exact": ("fp32", BATCH, 1, {})}
    runs |= {name: ("bf16", 1, *grid) for name, grid in grids.items()}
    for processes in (1, 2):
        cases = [
            {"recipe": recipe_for(data, precision, micro, grid), "run": str(tmp_path / name)}
            for name, (precision, micro, count, grid) in runs.items()
            if count == processes
        ]
        run_workers(processes, "train", cases, tmp_path / f"workers-{processes}")
    exact = gradients_of(tmp_path / "exact")
    for name in grids:
        far = error(gradients_of(tmp_path / name), exact)
        print(f"{name}: {far.pop('all'):.2%} in all, at most {max(far.values()):.2%}")
        assert max(far.values()) < 1e-2, (name, far)  # 2⁻⁸ is a rounding of bf16
    for stage in stages:  # the same micro batches: only the sum over ranks is another
        several, alone = (gradients_of(tmp_path / f"{word}zero-{stage}") for word in ("data-", ""))
        far = error(several, alone)
        assert max(far.values()) < 1e-4, (stage, far)
