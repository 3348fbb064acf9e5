"""Topology is not science: the same recipe on every grid, ZeRO stage and dialect."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from tests.tools import (
    DIALECTS,
    base_recipe,
    check_theory,
    losses_of,
    metrics_of,
    run_workers,
    spectra_of,
)

GRIDS = {
    1: [(1, 1, stage) for stage in (0, 1, 2, 3)],
    2: [(2, 1, stage) for stage in (0, 1, 2, 3)]
    + [(1, 2, stage) for stage in (0, 1)]
    + [(1, 1, stage) for stage in (0, 1, 2, 3)],
    4: [(2, 2, stage) for stage in (0, 1)],
}
"""(tensor, pipeline, ZeRO stage) by number of processes; data parallelism takes the rest."""


def recipe_for(data: Path, dialect: str, tensor: int, pipeline: int, stage: int) -> dict:
    values = deepcopy(base_recipe(data))
    values["model"] |= DIALECTS[dialect]
    values["train"] = {"steps": 20, "global_batch": 8}
    values["ranks"] = {"every": 10, "spectra": True}
    values["evaluation"] |= {"every": 20, "at_end": "sample"}
    values["checkpoint"] = {"every": 20}
    values["grid"] = {
        "tensor_parallel": tensor,
        "pipeline_parallel": pipeline,
        "zero_stage": stage,
    }
    return values


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Path]:
    """One run folder per (processes, dialect, tensor, pipeline, stage)."""
    folder = tmp_path_factory.mktemp("grids")
    found = {}
    for processes, grids in GRIDS.items():
        cases = []
        for dialect in DIALECTS:
            for tensor, pipeline, stage in grids:
                key = (processes, dialect, tensor, pipeline, stage)
                found[key] = folder / "-".join(map(str, key))
                recipe = recipe_for(data, dialect, tensor, pipeline, stage)
                cases.append({"recipe": recipe, "run": str(found[key])})
        # Switches that must not change a number either.
        if processes == 2:
            for dialect in DIALECTS:
                key = (processes, dialect, 2, 1, "sequence")
                found[key] = folder / "-".join(map(str, key))
                recipe = recipe_for(data, dialect, 2, 1, 1)
                recipe["grid"] |= {"sequence_parallel": True, "activation_checkpointing": True}
                cases.append({"recipe": recipe, "run": str(found[key])})
        run_workers(processes, "train", cases, folder / f"workers-{processes}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dialect", DIALECTS)
def test_same_numbers_on_every_grid(runs: dict[tuple, Path], dialect: str) -> None:
    reference = runs[1, dialect, 1, 1, 0]
    losses, spectra = losses_of(reference), spectra_of(reference)
    evaluation = json.loads((reference / "evaluation.json").read_text())
    norms = np.array([row["grad_norm"] for row in metrics_of(reference) if row["kind"] == "train"])
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    for key, run in runs.items():
        if key[1] != dialect:
            continue
        np.testing.assert_allclose(losses_of(run), losses, rtol=1e-4, err_msg=str(key))
        found = [row["grad_norm"] for row in metrics_of(run) if row["kind"] == "train"]
        np.testing.assert_allclose(found, norms, rtol=1e-3, err_msg=str(key))
        others = spectra_of(run)
        assert others.keys() == spectra.keys()
        for head, sigma in spectra.items():
            assert np.abs(others[head] - sigma).max() <= 1e-4 * sigma[0], (key, head)
        figures = json.loads((run / "evaluation.json").read_text())
        assert figures["documents_sha256"] == evaluation["documents_sha256"]
        for name, row in [*figures["subsets"].items(), ("all", figures["overall"])]:
            wanted = evaluation["subsets"].get(name, evaluation["overall"])
            assert abs(row["loss"] / wanted["loss"] - 1) < 1e-5, (key, name)
            assert abs(row["bits_per_byte"] / wanted["bits_per_byte"] - 1) < 1e-5, (key, name)


@pytest.mark.slow
def test_every_head_once_and_within_theory(runs: dict[tuple, Path]) -> None:
    total = 0
    for (_, dialect, *_), run in runs.items():
        rows = check_theory(run)
        per_step = 2 * (2 * 4 + (2 * 2 if dialect == "llama" else 0))
        assert rows == 3 * per_step
        total += rows
    assert total > 1000
