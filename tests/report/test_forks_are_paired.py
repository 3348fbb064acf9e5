"""A fork is paired with what shares its weights: its trunk, other forks, runs like its trunk."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.report.compare import pairs_of, unpaired
from pretrain.report.load import load_study
from pretrain.runs.identity import line_of
from pretrain.training.faults import SKIPPED
from tests.fake_runs import recipe, write_run

LINES = {
    "trunk": ["root"],
    "other decay from the start": ["root"],
    "fork": ["root", "step 10"],
    "sibling": ["root", "step 10"],
    "later fork": ["root", "step 20"],
    "fork of the fork": ["root", "step 10", "step 30"],
    "stranger": ["elsewhere"],
    "stranger's fork": ["elsewhere", "step 10 of it"],
}
FORKED = {"fork": ("trunk", 10), "sibling": ("trunk", 10), "later fork": ("trunk", 20),
          "fork of the fork": ("fork", 30), "stranger's fork": ("stranger", 10)}  # fmt: skip


def write(folder: Path, decay: float, recorded: bool = True, **more: Any) -> Path:
    """A run of seed 1 with the weights of its line.

    Args:
        recorded: whether a fork records its trunks, as earlier versions did not.
    """
    *trunks, weights = LINES[folder.name]
    identity: dict[str, Any] = {"initial_weights": weights}
    if trunks and recorded:
        identity["trunks"] = trunks
    values = recipe(seed=1, optimizer__weight_decay__attention=decay)
    write_run(folder, values, np.random.default_rng(0), identity=identity, **more)
    if folder.name in FORKED:
        name, step = FORKED[folder.name]
        starts = json.loads((folder / "environment.json").read_text())
        starts[0]["forked"] = {"run": f"gone/{name}", "step": step}
        (folder / "environment.json").write_text(json.dumps(starts))
    return folder


@pytest.mark.parametrize(
    "recorded", [True, pytest.param(False, marks=pytest.mark.long)], ids=["now", "earlier version"]
)
@pytest.mark.parametrize(("one", "other"), itertools.combinations(LINES, 2))
def test_what_shares_weights_is_a_pair(
    one: str, other: str, recorded: bool, tmp_path: Path
) -> None:
    folders = [write(tmp_path / name, decay, recorded) for name, decay in ((one, 1.0), (other, 2))]
    study = load_study(folders)
    assert len(study.conditions) == 2
    (condition,) = (item for item in study.conditions if item is not study.baseline)
    shares = bool(set(LINES[one]) & set(LINES[other]))
    notes = unpaired(study)
    if recorded:
        assert bool(pairs_of(condition, study.baseline)) == shares == (not notes)
        return
    known = {name: [name in FORKED, FORKED.get(name, ("",))[0] in (one, other)]
             for name in (one, other)}  # fmt: skip
    if all(is_there or not is_fork for is_fork, is_there in known.values()):
        assert bool(pairs_of(condition, study.baseline)) == shares
    if notes and any(is_fork and not is_there for is_fork, is_there in known.values()):
        assert "is a fork, and the initial weights of its trunk are not known" in notes[0]


def test_the_same_recipe_from_another_step_is_another_condition(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, decay) for name, decay in
               (("trunk", 0.0), ("other decay from the start", 3.0), ("fork", 3.0))]  # fmt: skip
    study = load_study(folders)
    names = {condition.runs[0].path.name: condition.name for condition in study.conditions}
    assert names == {
        "trunk": "attention = 0",
        "other decay from the start": "attention = 3",
        "fork": "attention = 3 (from step 10)",
    }
    assert not unpaired(study)
    siblings = load_study([write(tmp_path / "2" / name, decay)
                           for name, decay in (("fork", 0.0), ("sibling", 3.0))])  # fmt: skip
    assert [item.name for item in siblings.conditions] == ["attention = 0", "attention = 3"]


@pytest.mark.parametrize(("step", "apart"), [(4, False), (15, True)])
def test_a_fork_has_the_skipped_updates_of_its_trunk(
    step: int, apart: bool, tmp_path: Path
) -> None:
    """The trunk's own folder has them alone, so they must not count against the pair."""
    event = {"step": step, "message": f"loss nan: {SKIPPED}"}
    write(tmp_path / "trunk", 0.0, events=(event,))
    write(tmp_path / "fork", 3.0)
    study = load_study([tmp_path])
    assert study.runs[0].skipped == (step,)
    assert [note for note in unpaired(study) if "skipped updates" in note] == unpaired(study)
    assert bool(unpaired(study)) == apart


def test_a_line_is_of_the_run_that_the_folder_holds(tmp_path: Path) -> None:
    folder = write(tmp_path / "fork of the fork", 0.0)
    assert line_of(folder, "step 30") == ["root", "step 10", "step 30"]
    assert line_of(folder, "other") == ["other"]
    assert line_of(tmp_path / "gone", "other") == ["other"]
