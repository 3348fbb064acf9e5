"""The task of docs/extending.md: its samples are trained and scored as any, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pretrain.config.recipe import load_config
from pretrain.errors import UsageError
from pretrain.runs.metrics import read_metrics
from pretrain.tasks.tasks import open_task
from tests.own_code import TASK, write_example
from tests.tasks.test_tasks import COMMON, SMALL
from tests.tools import assert_one_line, losses_of, pretrain, run, write_recipe

ENTRY = {"kind": "parity.py:Parity"}


def recipe_of_parity(folder: Path, **more: Any) -> Path:
    """A recipe beside the page's files."""
    write_example(folder)
    values = {
        **COMMON,
        "model": {"dialect": "gpt2", "context": 12, **SMALL},
        "task": {"kind": "own", "own": {**ENTRY, **more}},
    }
    return write_recipe(folder / "r.yaml", values)


def test_the_example_trains_and_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of_parity(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    done = pretrain("train", str(recipe), "--out", str(one))
    assert done.returncode == 0, done.stderr[-2000:]
    words = ("train", str(recipe), "grid.tensor_parallel=2", "--out", str(two))
    done = pretrain(*words, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(losses_of(two), losses_of(one), rtol=1e-5)
    for step in (3, 6):
        first, second = (
            next(row for row in read_metrics(folder, "evaluation") if row["step"] == step)
            for folder in (one, two)
        )
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
        assert first["accuracy"] == second["accuracy"] and 0.2 < first["accuracy"] < 0.8
    # Chance: parity is not learned in six updates.
    assert losses_of(one)[0] == pytest.approx(np.log(2), abs=0.05)
    # Afterwards its samples are needed, and run where they are named.
    shutil.copytree(one, tmp_path / "moved")
    done = pretrain("evaluate", str(tmp_path / "moved"), "--documents", "50")
    assert done.returncode == 2
    assert_one_line(done.stderr, ("task.own: parity.py:Parity", "--code"))
    more = ["--code", str(tmp_path / "parity.py"), "--documents", "50", "--json"]
    done = pretrain("evaluate", str(tmp_path / "moved"), *more)
    assert done.returncode == 0, done.stderr[-2000:]
    last = read_metrics(one, "evaluation")[-1]
    assert json.loads(done.stdout)["overall"]["loss"] == pytest.approx(last["loss"], rel=1e-6)
    # Another file is another task.
    (tmp_path / "parity.py").write_text(TASK.replace("sum() % 2", "max()"))
    assert run(monkeypatch, "train", str(recipe), "--out", str(one)) == 2
    assert_one_line(capfd.readouterr().err, ("task.own.sha256=", "the recipe says"))


def test_workers_are_refused(tmp_path: Path) -> None:
    """They would need the user's file, which only this process runs."""
    config = load_config(recipe_of_parity(tmp_path), ["task.workers=2"], [tmp_path / "parity.py"])
    with pytest.raises(UsageError, match=r"task\.workers=2: .*leave task\.workers out"):
        open_task(config)


WRONG: dict[str, tuple[str, str, str]] = {
    "a label too large": ("bits.sum() % 2", "7", "labels range from -1 to 7, but answers is 2"),
    "an input below 0": ("return bits,", "return bits - 1,", "inputs range from -1"),
    "the wrong length": ("return bits,", "return bits[1:],", "of shape (11,)"),
    "no integers": ("return bits,", "return bits / 1,", "inputs are float64"),
    "no pair": ("return bits, labels", "return bits", "not a pair"),
    "a sample that fails": ("return bits, labels", "return bits[99], labels", "IndexError"),
    "answers": ("return 2\n", "return 'two'\n", "answers returns 'two'"),
    "training fails": ("return Bits(seed, model.context)", "return Bits(seed)", "training fails"),
    "other numbers of labels": (
        "labels[-1] =",
        "labels[number % 3 - 3 :] =",
        "and an earlier one 3",
    ),
    "no label": ("labels[-1] =", "labels[:0] =", "sample 0 has 0 labels; every"),
    "held-out fails": ("Bits(self.config.held_out_seed", "Bits(self.seed", "held_out fails"),
}


@pytest.mark.parametrize("case", WRONG)
def test_samples_that_are_wrong(case: str, tmp_path: Path) -> None:
    before, after, culprit = WRONG[case]
    recipe = recipe_of_parity(tmp_path)
    assert TASK.count(before) == 1
    (tmp_path / "parity.py").write_text(TASK.replace(before, after))
    config = load_config(recipe, code=[])
    with pytest.raises(ValueError, match=r"^task\.own: parity\.py:Parity: ") as error:
        task = open_task(config)
        task.training(config), task.held_out(config)
    assert culprit in str(error.value) and "\n" not in str(error.value)


def test_samples_of_several_labels_are_scored_by_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    recipe = recipe_of_parity(tmp_path)
    (tmp_path / "parity.py").write_text(
        TASK.replace("labels[-1] = bits.sum() % 2", "labels[-4:] = bits[-4:]")
    )
    found = []
    for micro in (16, 2 if request.config.getoption("--long") else 8):
        out = tmp_path / f"micro-{micro}"
        words = (
            "train.steps=40",
            "evaluation.every=40",
            f"train.micro_batch={micro}",
            "optimizer.learning_rate=1e-2",
        )
        assert run(monkeypatch, "train", str(recipe), *words, "--out", str(out)) == 0
        last = read_metrics(out, "evaluation")[-1]
        # What stands in the input is learned: the held-out loss is that of training.
        assert last["accuracy"] <= 1.0
        assert last["loss"] == pytest.approx(losses_of(out)[-1], abs=0.2)
        found.append(losses_of(out))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


@pytest.mark.parametrize(("task", "culprit"), [
    ({"kind": "own"}, "task.own: set it exactly if task.kind is own"),
    ({"kind": "text", "own": ENTRY}, "task.own: set it exactly if task.kind is own"),
    ({"kind": "own", "own": {}}, "task.own.kind: missing"),
    ({"kind": "own", "own": {"kind": "sums"}}, "task.own.kind: 'sums' is not a task"),
    ({"kind": "own", "own": {"kind": "none.py:Parity"}}, "task.own.kind: "),
    ({"kind": "own", "own": {**ENTRY, "held_out_sed": 1}}, "did you mean held_out_seed"),
    ({"kind": "own", "own": {**ENTRY, "held_out_seed": -1}}, "task.own.held_out_seed"),
])  # fmt: skip
def test_entries_that_are_wrong(task: dict[str, Any], culprit: str, tmp_path: Path) -> None:
    recipe = recipe_of_parity(tmp_path)
    values = {**yaml.safe_load(recipe.read_text()), "task": task}
    with pytest.raises(ValueError, match=r"") as error:
        load_config(write_recipe(recipe, values), code=[])
    assert culprit in str(error.value) and "\n" not in str(error.value)
