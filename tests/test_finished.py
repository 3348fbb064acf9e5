"""When a run counts as finished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pretrain.report.load import load_run, load_study
from pretrain.runs.finished import is_complete
from pretrain.runs.metrics import METRICS


@pytest.mark.parametrize("skipped", [1, 2])
def test_the_last_updates_were_skipped(trained: Path, tmp_path: Path, skipped: int) -> None:
    """They have no training metrics; the run went to its end all the same."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    steps = load_run(run).config.train.steps
    kept = [row for row in rows if row["kind"] != "train" or row["step"] <= steps - skipped]
    assert len(kept) == len(rows) - skipped
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in kept))
    found = load_run(run)
    assert found.is_finished and found.last_step == steps
    assert is_complete(run, found.config) and len(load_study([run]).conditions) == 1


def test_a_run_under_way_is_not(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] < 6))
    (run / "evaluation.json").unlink()
    assert not load_run(run).is_finished
