"""Folders of runs within a reported folder are named, because a report does not read them."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import UsageError
from pretrain.report import write_report
from pretrain.report.load import load_study
from tests.fake_runs import recipe, write_run, write_study


@pytest.fixture
def outer(tmp_path: Path) -> Path:
    """A folder of one run, with a sweep, a folder of runs and others beside it."""
    outer = tmp_path / "runs"
    write_run(outer / "first", recipe(), np.random.default_rng(0))
    write_study(outer / "sweep", decays=(0.0,), seeds=(1,))
    write_run(outer / "set 2/second", recipe(seed=2), np.random.default_rng(0))
    for name in ("logs", "first/logs/run", ".hidden"):
        (outer / name).mkdir(parents=True)
    return outer


def test_nested_folders_are_named(outer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = f"left out: {outer}/set 2, {outer}/sweep: folders of runs; give them, too"
    write_report([outer], outer.parent / "csv", "csv")
    assert [row["note"] for row in csv.DictReader((outer.parent / "csv/notes.csv").open())] == [
        note
    ]
    assert note in " ".join(capsys.readouterr().err.split())


def test_folders_that_are_given_are_not_left_out(outer: Path) -> None:
    (note,) = load_study([outer, outer / "sweep"]).notes
    assert note == f"left out: {outer}/set 2: a folder of runs; give it, too"
    assert len(load_study([outer, outer / "sweep/../sweep", outer / "set 2"]).runs) == 3


def test_many_folders_are_counted(outer: Path) -> None:
    for number in range(10, 13):
        shutil.copytree(outer / "set 2", outer / f"set {number}")
    (note,) = load_study([outer]).notes
    assert note.startswith(f"left out: {outer}/set 2, {outer}/set 10, {outer}/set 11 and 2 more: ")


def test_beside_the_runs_of_a_sweep(outer: Path) -> None:
    shutil.copytree(outer / "set 2", outer / "sweep/again")
    (note,) = load_study([outer / "sweep"]).notes
    assert note == f"left out: {outer}/sweep/again: a folder of runs; give it, too"


def test_a_folder_of_nothing_but_folders_says_what_to_give(outer: Path) -> None:
    shutil.rmtree(outer / "first")
    with pytest.raises(
        UsageError, match=f"contains no run folder; give {outer}/set 2, {outer}/sweep"
    ):
        load_study([outer])
