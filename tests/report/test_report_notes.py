"""What a report leaves out or does not compare is named, with both values, in every form."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.errors import UsageError
from pretrain.report import write_report
from pretrain.report.load import load_study
from pretrain.report.tables import paired
from pretrain.report.text import table_csv
from tests.fake_runs import (
    STEPS,
    leave_pairs,
    recipe,
    write_perplexities,
    write_run,
    write_study,
)

pytestmark = pytest.mark.usefixtures("parsed_once")


@pytest.fixture
def study(tmp_path: Path, undrawn: None) -> Path:
    """λ 0 and 1, three seeds, no fault in it."""
    return write_study(tmp_path / "runs", decays=(0.0, 1.0), seeds=(1, 2, 3))


ODD = "attention=1,seed=2"


def notes(folder: Path, **more: Any) -> list[str]:
    """The notes, which are the same in every form."""
    write_report([folder], folder / "csv", "csv", **more)
    found = [row["note"] for row in csv.DictReader((folder / "csv" / "notes.csv").open())]
    write_report([folder], folder / "r.html", "html", **more)
    write_report([folder], folder / "r.md", "md", **more)
    page = html.unescape((folder / "r.html").read_text())
    text = (folder / "r.md").read_text()
    for note in found:
        assert note in page, note
        assert note.replace("<", "&lt;") in text.replace("\\", ""), note
    return found


def pairs(folder: Path, figure: str = "perplexity") -> int:
    rows = csv.DictReader((folder / "csv" / "differences.csv").open())
    return next(int(row["pairs"]) for row in rows if row["figure"] == figure)


def rewrite(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


def test_a_whole_study_has_no_notes(study: Path) -> None:
    assert notes(study) == [] and pairs(study) == 3


def test_planned_runs_that_are_gone(study: Path) -> None:
    shutil.rmtree(study / ODD)
    shutil.copytree(study / "attention=1,seed=1", study / "attention=9,seed=9")
    found = notes(study)
    assert any(ODD in note and "planned" in note for note in found)
    assert any("attention=9,seed=9" in note and "not a run of sweep.json" in note for note in found)
    assert any("fewer than 3 pairs" in note for note in found) and pairs(study) == 2


def test_why_a_run_is_not_finished(study: Path) -> None:
    """Never "not finished (40 of 40 steps)"; and a last update that was skipped is a last one."""
    (study / ODD / "evaluation.json").unlink()
    short = study / "attention=1,seed=3"
    shutil.rmtree(short)
    values = recipe(seed=3, optimizer__weight_decay__attention=1.0)
    write_run(short, values, np.random.default_rng(0), last=20)
    found = notes(study)
    assert any(ODD in note and "not evaluated" in note for note in found)
    assert any(f"{short}: not finished (20 of {STEPS} steps)" in note for note in found)
    assert not any(f"{STEPS} of {STEPS}" in note for note in found)
    taken = notes(study, unfinished=True)
    assert any(note.startswith("included although not finished") for note in taken)
    skip = {"step": STEPS, "message": "the loss is nan: the update is skipped"}
    for left_out in ("evaluation", "event"):  # the other one is enough
        shutil.rmtree(short)
        write_run(short, values, np.random.default_rng(0), events=(skip,))
        lines = (short / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["kind"] != left_out]
        (short / "metrics.jsonl").write_text("".join(kept))
        found = notes(study)
        assert not any("not finished" in note for note in found), left_out
        said = any("skipped updates" in note and str(STEPS) in note for note in found)
        assert said == (left_out != "event")


SETTINGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "stride": ({"stride": 8}, "stride 8", "the context"),
    "documents": ({"documents_sha256": "cd" * 32}, "cdcdcdcd", "abababab"),
    "split": ({"split": "val"}, "split val", "test"),
    "precision": ({"precision": "bf16"}, "precision bf16", "that of training"),
    "step": ({"step": 20}, "of step 20", f"{STEPS}"),
    "rank": ({"attention_rank": 0.5}, "attention rank 0.5", "whole"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_other_settings_of_an_evaluation(study: Path, case: str) -> None:
    """Figures of other settings are in no mean and no pair, and both values are said."""
    change, mine, others = SETTINGS[case]
    rewrite(study / ODD / "evaluation.json", **change)
    (note,) = (one for one in notes(study) if one.startswith("held-out figures left out"))
    assert ODD in note and mine in note and others in note
    assert pairs(study) == 2 and pairs(study, "rank W_QK") == 3
    rows = list(csv.DictReader((study / "csv" / "perplexity.csv").open()))
    assert {row["condition"]: row["n"] for row in rows} == {
        "attention = 0": "3",
        "attention = 1": "2",
    }


def test_older_evaluations_still_compare(study: Path) -> None:
    """Folders that do not say precision and context are taken as the others."""
    for path in study.glob("*/evaluation.json"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps({k: values[k] for k in values if k not in
                                    ("precision", "context")}))  # fmt: skip
    (study / ODD / "environment.json").unlink()
    assert notes(study) == [] and pairs(study) == 3


def test_other_updates_are_not_paired(study: Path) -> None:
    """Jumped samples, skipped updates, another precision: not the same training."""
    jumped, skipped, odd = (study / f"attention=1,seed={seed}" for seed in (1, 2, 3))
    (jumped / "jumps.json").write_text("[3, 4]")
    event = {
        "kind": "event",
        "step": 5,
        "message": "a gradient is not finite: the update is skipped",
    }
    with (skipped / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    starts = json.loads((odd / "environment.json").read_text())
    (odd / "environment.json").write_text(json.dumps([*starts, {**starts[0], "precision": "bf16"}]))
    found = notes(study)
    assert any(str(jumped) in note and "3, 4 and none" in note for note in found)
    assert any(str(skipped) in note and "skipped updates: 5 and none" in note for note in found)
    assert any(str(odd) in note and "fp32 then bf16 and in fp32" in note for note in found)
    assert any("attention = 1" in note and "different precisions" in note for note in found)
    assert pairs(study) == 0
    # The same faults on both sides are the same training.
    for name in ("jumps.json", "metrics.jsonl"):
        for source, target in ((jumped, "attention=0,seed=1"), (skipped, "attention=0,seed=2")):
            if (source / name).exists():
                shutil.copy(source / name, study / target / name)
    notes(study)
    assert pairs(study) == 2


@pytest.mark.usefixtures("undrawn")
def test_precision_as_the_thing_studied_is_paired(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for precision in ("fp32", "bf16"):
        for seed in (1, 2, 3):
            values = recipe(seed=seed, precision=precision)
            write_run(tmp_path / "a" / f"{precision}{seed}", values, rng, precision=precision)
            decay = float(precision == "bf16")
            values = recipe(
                seed=seed, precision=precision, optimizer__weight_decay__attention=decay
            )
            write_run(tmp_path / "b" / f"{precision}{seed}", values, rng, precision=precision)
    assert notes(tmp_path / "a") == [] and pairs(tmp_path / "a") == 3
    found = notes(tmp_path / "b")
    assert sum("trained in bf16 and in fp32" in note for note in found) == 3
    assert pairs(tmp_path / "b") == 0


def test_seeds_that_the_baseline_lacks(study: Path) -> None:
    shutil.rmtree(study / "attention=0,seed=3")
    assert any("seed 3" in note and "not paired" in note for note in notes(study))


def test_a_baseline_that_is_not_there(study: Path, tmp_path: Path) -> None:
    """Another one is named as such, with both names; it can be chosen."""
    for seed in (1, 2, 3):
        (study / f"attention=0,seed={seed}" / "evaluation.json").unlink()
    (note,) = (one for one in notes(study) if one.startswith("baseline: "))
    assert "attention=0" in note and "compared with all runs" in note


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ({1: 0, 2: 1, 3: 2},
         ["fewer than 3 pairs, so intervals and p have little meaning: attention = 3 (2); use 3 "
          "seeds or more",
          "one pair: no interval and no p: attention = 2; use 3 seeds or more"]),
        ({1: 0, 2: 0, 3: 4}, []),
    ],
)  # fmt: skip
def test_few_pairs_are_advised_where_more_seeds_help(
    pairs: dict[int, int], told: list[str], tmp_path: Path
) -> None:
    """Why a condition has no pair is said run by run: more seeds would not change it."""
    folder = write_perplexities(tmp_path / "runs", dict.fromkeys((0.0, 1.0, 2.0, 3.0), 9.0))
    leave_pairs(folder, pairs)
    found = notes(folder)
    assert sorted(note for note in found if "seeds or more" in note) == told
    assert sum("differ in initial weights" in note for note in found) == 12 - sum(pairs.values())


@pytest.mark.parametrize(
    ("key", "value"), [("ranks__threshold", 0.9), ("ranks__denominator", "model")]
)
def test_ranks_of_other_definitions_are_refused(study: Path, key: str, value: Any) -> None:
    shutil.rmtree(study / ODD)
    values = recipe(seed=2, optimizer__weight_decay__attention=1.0, **{key: value})
    write_run(study / ODD, values, np.random.default_rng(0))
    with pytest.raises(UsageError, match=r"ranks\.threshold.*uses ranks\.threshold") as error:
        load_study([study])
    assert ODD in str(error.value) and str(value) in str(error.value)


@pytest.mark.usefixtures("small_figures")
def test_a_lost_head_is_not_called_qk_norm(tmp_path: Path) -> None:
    """Weights that are not finite are named; QK-norm is said where it is."""

    def lost(row: dict[str, Any]) -> None:
        row["nonfinite"] = True
        names = ("pseudo_rank", "balance", "nuclear_norm", "frobenius_bound", "discrepancy",
                 "rope_pair_balance", "rope_pair_discrepancy")  # fmt: skip
        row |= dict.fromkeys(names, float("nan"))

    folder = write_run(tmp_path / "lost", recipe(), np.random.default_rng(0), ranks=lost)
    found = notes(folder)
    assert any("layer 0 qk head 0: weights are not finite" in note for note in found)
    page = (folder / "r.html").read_text()
    assert "no finite values" in page and "(QK-norm)" not in page

    def normed(row: dict[str, Any]) -> None:
        if row["product"] == "qk":
            row |= {"balance": float("nan"), "frobenius_bound": float("nan"),
                    "discrepancy": float("nan"), "nuclear_norm": float("nan")}  # fmt: skip

    values = recipe(model__dialect="llama", model__qk_norm=True)
    folder = write_run(tmp_path / "norm", values, np.random.default_rng(0), ranks=normed)
    assert notes(folder) == []
    assert re.search(r"does not apply \(QK-norm\)", (folder / "r.html").read_text())


def write_conditions(folder: Path, count: int) -> list[Path]:
    """Runs of so many conditions, one of each."""
    return [
        write_run(
            folder / f"{count}-{number}",
            recipe(optimizer__weight_decay__attention=0.5 * number),
            np.random.default_rng(number),
        )
        for number in range(count)
    ]


def test_differences_have_the_same_columns_without_any(tmp_path: Path) -> None:
    """A script that reads differences.csv need not know how many conditions there are."""
    heads = []
    for count in (1, 2):
        runs = write_conditions(tmp_path, count)
        heads.append(table_csv(paired(load_study(runs))).splitlines()[0])
    assert heads[0] == heads[1]


@pytest.mark.parametrize("form", ["html", "md", "latex"])
@pytest.mark.parametrize("count", [1, 2])
def test_no_table_is_empty(
    tmp_path: Path, count: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.report.printed.draw", lambda *_: b"")  # not of the tables
    runs = write_conditions(tmp_path, count)
    write_report(runs, tmp_path / "report", form)
    text = (tmp_path / "report").read_text()
    assert ("Paired differences" in text) == (count == 2)
    if form == "latex":
        assert "(U+" not in text  # a letter that it lacks
