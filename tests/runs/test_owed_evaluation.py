"""An evaluation after the last update that a signal or a full disk cuts short is made once."""

from __future__ import annotations

import errno
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import pretrain.runs.metrics
from pretrain.checkpoint.reader import OWES_EVALUATION, Checkpoint, list_checkpoints
from pretrain.checkpoint.retention import HELD_OUT_LOSS
from pretrain.runs.finished import is_complete
from pretrain.runs.folder import recipe_of
from pretrain.runs.metrics import read_metrics
from pretrain.training import periodic
from tests.tools import base_recipe, run, write_recipe

STEPS = 6


class Evaluations:
    """Held-out losses of their step; at the last step, some calls are cut short by a signal."""

    def __init__(self, cuts: int) -> None:
        self.cuts = cuts

    def __call__(self, job: Any, chosen: Any, step: int, show: Any = None) -> dict[str, Any]:
        if step == STEPS and self.cuts:
            self.cuts -= 1
            raise periodic._CutShortError
        return {"overall": {"loss": 5.0 - 0.1 * step}}


class Disk:
    """Takes lines of metrics, or no evaluation of the last step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        append = pretrain.runs.metrics._append

        def refuse(path: Path, line: str) -> None:
            if self.full and f'"evaluation", "step": {STEPS}' in line:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            append(path, line)

        monkeypatch.setattr(pretrain.runs.metrics, "_append", refuse)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def words_of(folder: Path, data: Path, keep_best: bool) -> list[str]:
    recipe = deepcopy(base_recipe(data))
    recipe["checkpoint"] = {"every": 2, "keep": 2, "keep_best": keep_best}
    del recipe["ranks"]
    recipe["evaluation"] |= {"every": 2, "at_end": "none"}
    path = write_recipe(folder / "recipe.yaml", recipe)
    return ["train", str(path), "--out", str(folder / "run")]


def last(folder: Path) -> Checkpoint:
    return Checkpoint(list_checkpoints(folder / "run/checkpoints")[-1])


@pytest.mark.parametrize(
    ("keep_best", "cuts", "refused"),
    [
        (True, 2, True),
        (False, 1, False),
        pytest.param(False, 2, True, marks=pytest.mark.long),
        pytest.param(True, 1, False, marks=pytest.mark.long),
    ],
)
def test_an_evaluation_that_is_owed_is_made_once(
    keep_best: bool, cuts: int, refused: bool, data: Path, tmp_path: Path, disk: Disk,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(periodic, "_figures", Evaluations(cuts))
    words = words_of(tmp_path, data, keep_best)
    for _ in range(cuts):
        assert run(monkeypatch, *words) == 75, capfd.readouterr().err
        assert last(tmp_path).state[OWES_EVALUATION]
        assert not is_complete(tmp_path / "run", recipe_of(tmp_path / "run"))
    disk.full = refused
    if refused:
        assert run(monkeypatch, *words) == 1
        assert "metrics.jsonl: No space left on device; free space" in capfd.readouterr().err
        disk.full = False
    assert run(monkeypatch, *words) == 0, capfd.readouterr().err
    lines = read_metrics(tmp_path / "run", "evaluation")
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert not last(tmp_path).state.get(OWES_EVALUATION)
    assert last(tmp_path).state[HELD_OUT_LOSS] == lines[-1]["loss"]
    assert is_complete(tmp_path / "run", recipe_of(tmp_path / "run"))
    assert run(monkeypatch, *words) == 0
    assert "nothing is left to do" in capfd.readouterr().err
    assert read_metrics(tmp_path / "run", "evaluation") == lines


def test_a_line_that_a_kill_left_is_not_written_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The process ended between the line and the checkpoint that pays the debt."""
    evaluations = Evaluations(1)
    monkeypatch.setattr(periodic, "_figures", evaluations)
    words = words_of(tmp_path, data, True)
    assert run(monkeypatch, *words) == 75
    with monkeypatch.context() as patch:
        patch.setattr(periodic, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(monkeypatch, *words) == 130
    evaluations.cuts = 1  # another evaluation would be cut short
    assert run(monkeypatch, *words) == 0, capfd.readouterr().err
    lines = read_metrics(tmp_path / "run", "evaluation")
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert last(tmp_path).state[HELD_OUT_LOSS] == lines[-1]["loss"]


@pytest.mark.parametrize("keep_best", [True, False])
def test_a_fork_does_not_owe_its_trunk_s_evaluation(
    keep_best: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Nor does it pay for it at a step of its own."""
    monkeypatch.setattr(periodic, "_figures", Evaluations(1))
    words = [*words_of(tmp_path, data, keep_best), "train.steps=11", "checkpoint.every=4",
             "evaluation.every=4"]  # fmt: skip
    assert run(monkeypatch, *words, "--until", "6") == 75
    fork = [*words[:2], "--out", str(tmp_path / "fork/run"), *words[4:]]
    source = f"{tmp_path / 'run'}@6"
    assert run(monkeypatch, *fork, "--fork", source, "--until", "7") == 0
    assert not last(tmp_path / "fork").state.get(OWES_EVALUATION)
    assert run(monkeypatch, *fork) == 0, capfd.readouterr().err
    found = [line["step"] for line in read_metrics(tmp_path / "fork/run", "evaluation")]
    assert found == [6] * keep_best + [7, 8, 11]
