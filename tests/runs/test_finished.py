"""When a run counts as finished."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pretrain.checkpoint.reader import list_checkpoints, step_of
from pretrain.checkpoint.saver import Saver
from pretrain.report.load import load_run, load_study
from pretrain.runs.finished import is_complete
from pretrain.runs.folder import EVALUATION
from pretrain.runs.metrics import METRICS, read_metrics
from tests.tools import assert_one_line, base_recipe, run, write_recipe


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


DAMAGED = ["", '{"overall": {"loss": "x"}}', "[]", "{}", '{"overall": 1}']


def test_a_damaged_evaluation_is_none(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    config = load_run(folder).config
    assert is_complete(folder, config)
    for text in DAMAGED:
        (folder / "evaluation.json").write_text(text)
        assert not is_complete(folder, config), text


@pytest.mark.parametrize(
    "text", [*DAMAGED[:2], *(pytest.param(one, marks=pytest.mark.long) for one in DAMAGED[2:])]
)
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


@pytest.mark.parametrize(
    ("left", "decay"),
    [
        ([3], 5.0),
        ([], 0.5),
        pytest.param([3], 0.5, marks=pytest.mark.long),
        pytest.param([], 5.0, marks=pytest.mark.long),
    ],
)
def test_an_evaluation_of_weights_that_are_trained_again_is_made_again(
    left: list[int], decay: float, trained: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Checkpoints were removed by hand: the folder's figures are of weights that are gone."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    whole = json.loads((folder / EVALUATION).read_text())
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        if step_of(checkpoint) not in left:
            shutil.rmtree(checkpoint)
    values = load_run(folder).config.model_dump(mode="json")
    values["optimizer"]["weight_decay"]["attention"] = decay
    recipe = str(write_recipe(tmp_path / "recipe.yaml", values))
    words = ["train", recipe, "resume.decay=recipe"]
    assert run(monkeypatch, *words, "--out", str(folder)) == 0, capfd.readouterr().err
    told = json.loads((folder / EVALUATION).read_text())
    assert json.loads((folder / "evaluation-val-sample.json").read_text()) == whole
    assert (told["overall"]["loss"] == whole["overall"]["loss"]) == (decay == 0.5)
    of_run = read_metrics(folder, "evaluation")[-1]
    assert (of_run["step"], of_run["loss"]) == (6, told["overall"]["loss"])


@pytest.mark.parametrize("step", [None, 6])
def test_figures_that_cannot_be_put_aside_stop_the_start(
    step: int | None, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """They are of other weights, and would count as those of the new ones."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = json.loads((folder / EVALUATION).read_text()) | {"step": step}
    (folder / EVALUATION).write_text(json.dumps(before))
    shutil.rmtree(list_checkpoints(folder / "checkpoints")[-1])
    recipe = write_recipe(tmp_path / "recipe.yaml", load_run(folder).config.model_dump(mode="json"))
    words = ["train", str(recipe), "--out", str(folder)]
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name == EVALUATION:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(self))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        assert run(patch, *words) == 1
    assert_one_line(capfd.readouterr().err, (f"{EVALUATION}: Operation not permitted",))
    assert run(monkeypatch, *words) == 0
    assert json.loads((folder / EVALUATION).read_text())["step"] == 6


def test_no_evaluation_of_a_checkpoint_that_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, commit = tmp_path / "run", Saver._commit
    recipe = write_recipe(tmp_path / "r.yaml", base_recipe(data))
    words = ["train", str(recipe), "--out", str(folder)]

    def full(self: Any, aside: Path, step: int, *more: Any) -> Path:
        if step == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(aside))
        return commit(self, aside, step, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "_commit", full)
        assert run(patch, *words) == 1
        assert "checkpoint at step 6 not written" in capfd.readouterr().err
        assert not (folder / EVALUATION).exists()
    assert run(monkeypatch, *words) == 0
    assert [one.name for one in folder.glob("evaluation*")] == [EVALUATION]


def test_an_evaluation_of_a_step_before_is_kept(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    shutil.rmtree(list_checkpoints(folder / "checkpoints")[-1])
    before = json.loads((folder / EVALUATION).read_text()) | {"step": 3}
    (folder / EVALUATION).write_text(json.dumps(before))
    recipe = write_recipe(tmp_path / "recipe.yaml", load_run(folder).config.model_dump(mode="json"))
    words = ["train", str(recipe), "--out", str(folder)]
    assert run(monkeypatch, *words, "--until", "4") == 0
    assert json.loads((folder / EVALUATION).read_text()) == before
    assert run(monkeypatch, *words) == 0
    assert json.loads((folder / EVALUATION).read_text())["step"] == 6


def test_a_merge_that_failed_is_made_by_the_next_start(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    words = ["train", str(write_recipe(tmp_path / "r.yaml", base_recipe(data))), "--out"]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "ranks.parquet"))

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.ranks.table._merge", full)
        assert run(monkeypatch, *words, str(folder)) == 0
    error = capfd.readouterr().err
    assert "ranks.parquet waits" in error and "No space left" in error
    assert not (folder / "ranks.parquet").exists()
    assert run(monkeypatch, *words, str(folder)) == 0
    assert "nothing is left to do" in capfd.readouterr().err
    tables = [pq.read_table(one / "ranks.parquet") for one in (folder, trained)]
    assert str(tables[0].to_pylist()) == str(tables[1].to_pylist())
