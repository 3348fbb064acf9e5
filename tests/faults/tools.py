"""Helpers of the fault suite: a small run, a fault put into it, and what is compared after."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.runs.folder import read_ranks
from pretrain.runs.metrics import read_metrics
from tests.tools import (
    ROOT,
    base_recipe,
    metrics_of,
    run_processes,
    start_processes,
    weights_of,
    write_recipe,
)
from tests.warm import WarmProcess

HERE = ROOT / "tests/faults"
STEPS = 10
GRIDS = {"one": [], "data": ["grid.zero_stage=0"], "stages": ["grid.pipeline_parallel=2"]}
"""Process grids of undisturbed runs: one process, two data-parallel, two pipeline stages."""
PROCESSES = {"one": 1, "data": 2, "stages": 2}


def words_of(folder: Path, data: Path, *more: str, steps: int = STEPS) -> list[str]:
    """The words of a small run in ``folder/run``."""
    values = base_recipe(data)
    values["train"]["steps"] = steps
    values["checkpoint"]["every"] = 2
    values["ranks"] = {"every": 5}
    values["evaluation"]["every"] = 5
    recipe = write_recipe(folder / "recipe.yaml", values)
    return ["train", str(recipe), "--out", str(folder / "run"), *more]


def faulty(
    fault: str, rank: int, updates: str, words: list[str], processes: int = 1, timeout: int = 240
) -> subprocess.CompletedProcess[str]:
    """The command line with a fault of ``faulty.py``."""
    return run_processes(
        [fault, str(rank), updates, *words], processes, timeout, HERE / "faulty.py"
    )


def started_until(moment: str, marker: Path, words: list[str], processes: int) -> WarmProcess:
    """The command line on forked processes, come to a moment of ``interrupted.py``."""
    process = start_processes([moment, str(marker), *words], processes, HERE / "interrupted.py")
    wait_until(lambda: marker.exists() or process.poll() is not None, 300, "the moment")
    assert process.poll() is None, process.errors()
    return process


def same_weights(run: Path, reference: Path) -> None:
    """Masters and moments are the same bits."""
    weights, wanted = weights_of(run), weights_of(reference)
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.array_equal(weights[name], value), name


def same_run(run: Path, reference: Path) -> None:
    """Everything that is logged, measured, scored and kept: nothing was lost or repeated."""
    assert metrics_of(run) == metrics_of(reference)
    # As text: a statistic that does not apply is NaN, which equals nothing.
    assert repr(read_ranks(run)) == repr(read_ranks(reference))
    same_weights(run, reference)
    assert (run / "evaluation.json").read_bytes() == (reference / "evaluation.json").read_bytes()
    assert not list((run / "checkpoints").glob(".*"))


def events_of(run: Path) -> list[str]:
    """Messages of what happened."""
    return [row["message"] for row in read_metrics(run, "event")]


def newest_step(run: Path) -> int:
    """The last step that was logged; 0 where a restart has taken all of them back."""
    found = read_metrics(run)
    return int(found[-1]["step"]) if found else 0


def wait_until(is_so: Callable[[], Any], seconds: float, what: str = "") -> float:
    """Poll; returns the seconds that it took."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < seconds, f"waited {seconds} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - began
