"""When a run counts as finished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pretrain.report.load import load_run, load_study
from pretrain.runs.finished import is_complete
from pretrain.runs.metrics import METRICS
from tests.tools import run, write_recipe


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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"overall": 1}', '{"overall": {"loss": "x"}}'])
def test_a_damaged_evaluation_is_made_anew(
    text: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It is no evaluation: the run is not complete, the same words complete it and lose nothing."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    whole = json.loads((folder / "evaluation.json").read_text())
    config = load_run(folder).config
    (folder / "evaluation.json").write_text(text)
    assert not is_complete(folder, config)
    recipe = write_recipe(tmp_path / "recipe.yaml", config.model_dump(mode="json"))
    assert run(monkeypatch, "train", str(recipe), "--out", str(folder)) == 0
    assert "evaluation.json: damaged; renamed to damaged-evaluation.json" in capfd.readouterr().err
    assert (folder / "damaged-evaluation.json").read_text() == text
    assert json.loads((folder / "evaluation.json").read_text()) == whole
    assert is_complete(folder, config)


def test_what_is_said_with_until(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    recipe = write_recipe(tmp_path / "recipe.yaml", load_run(folder).config.model_dump(mode="json"))
    words = ["train", str(recipe), "--out", str(folder), "ranks.every=1"]
    for until, said in (
        ("3", "--until 3, its newest checkpoint has step 6"),
        (None, "last step"),
    ):
        more = ["--until", until] if until else []
        assert run(monkeypatch, *words, *more) == 2
        error = capfd.readouterr().err
        assert said in error and ("last step" in error) == (until is None)
