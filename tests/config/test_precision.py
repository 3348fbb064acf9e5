"""What `precision: auto` meant is the run's, and what was scored is what the label says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import pretrain.engine.precision
import pretrain.training.origin
from data_pipeline.manifest import load_manifest
from pretrain.checkpoint.reader import Checkpoint, list_checkpoints
from pretrain.config.recipe import dump_config, load_config, parse_config
from pretrain.errors import UsageError
from pretrain.runs.folder import CONFIG, ENVIRONMENT, EVALUATION, misfit, recipe_of, resume_point
from pretrain.runs.identity import IDENTITY, read_identity
from pretrain.tasks.text import Text
from tests.tools import base_recipe, run, write_recipe

pytestmark = pytest.mark.slow


def test_a_run_keeps_what_its_precision_was(trained: Path) -> None:
    """Its recipe, manifest and identity say a precision, never auto."""
    assert recipe_of(trained).precision == "fp32"
    assert read_identity(trained, ("precision",)) == {"precision": "fp32"}
    assert (trained / IDENTITY).is_file()


@pytest.mark.parametrize(
    ("fast", "precision", "at_end", "split"),
    [(True, "bf16", "all", "test"), (False, "fp32", "sample", "val")],
)
def test_every_file_says_what_was_meant(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fast: bool,
    precision: str,
    at_end: str,
    split: str,
) -> None:
    monkeypatch.setattr(pretrain.engine.precision, "multiplies_bf16", lambda: fast)
    values = {**base_recipe(data), "precision": "auto"}
    values["train"] = {"steps": 3, "global_batch": 8}
    values["evaluation"] |= {"at_end": at_end}
    folder = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    assert run(monkeypatch, "train", str(recipe), "--out", str(folder)) == 0
    assert yaml.safe_load((folder / CONFIG).read_text())["precision"] == precision
    (last,) = list_checkpoints(folder / "checkpoints")[-1:]
    assert Checkpoint(last).config.precision == precision
    assert read_identity(folder, ("precision",)) == {"precision": precision}
    scores = json.loads((folder / EVALUATION).read_text())
    assert (scores["split"], scores["precision"]) == (split, precision)


@pytest.mark.parametrize("began", ["fp32", "bf16"])
@pytest.mark.parametrize("goes_on", ["fp32", "bf16"])
def test_another_precision_does_not_resume(
    tmp_path: Path, data: Path, began: str, goes_on: str
) -> None:
    """Also in a folder of an earlier version, which kept the word auto."""
    config = parse_config({**base_recipe(data), "precision": "auto"})
    now = config.model_copy(update={"precision": goes_on})
    (tmp_path / ENVIRONMENT).write_text(f'[{{"precision": "{began}"}}]')
    for kept in ("auto", began):
        (tmp_path / CONFIG).write_text(dump_config(config.model_copy(update={"precision": kept})))
        assert recipe_of(tmp_path).precision == began
        if began == goes_on:
            assert resume_point(tmp_path, now) is None  # fits; no checkpoint yet
            continue
        with pytest.raises(UsageError, match=f"precision={began}.*{goes_on}"):
            resume_point(tmp_path, now)


def test_a_fork_does_not_change_precision_unasked(trained: Path) -> None:
    trunk = Checkpoint(list_checkpoints(trained / "checkpoints")[-1])
    pretrain.training.origin._check_precision(trunk, "fp32", "auto")
    pretrain.training.origin._check_precision(trunk, "bf16", "bf16")  # asked for
    with pytest.raises(UsageError, match="set precision=fp32, or precision=bf16"):
        pretrain.training.origin._check_precision(trunk, "bf16", "auto")
    other = load_config(trained / CONFIG, ["precision=bf16"])
    task = Text(load_manifest(Path(other.data.path)))
    assert "precision fp32, here bf16" in misfit(
        trunk, other.model_copy(update={"model": task.complete(other.model)}), task
    )


def test_a_fork_under_auto_is_refused_in_another_precision(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pretrain.engine.precision, "multiplies_bf16", lambda: True)
    words = ["train", str(trained.parent / "recipe.yaml"), "precision=auto"]
    words += ["--fork", f"{trained}@3", "--out", str(tmp_path / "fork")]
    assert run(monkeypatch, *words) == 2
    assert "set precision=fp32" in capsys.readouterr().err


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "val", "test"), ("train", "test")])
def test_the_label_is_the_split_that_was_scored(data: Path, splits: tuple[str, ...]) -> None:
    manifest = load_manifest(data)
    kept = [entry for entry in manifest.entries if entry.split in splits]
    task = Text(replace(manifest, entries=tuple(kept)))
    config = parse_config(base_recipe(data))
    everything = task.split(config, everything=True)
    assert everything == ("test" if "test" in splits else "val")
    documents = sum(entry.documents for entry in kept if entry.split == everything)
    assert len(task.held_out(config, everything=True)) == documents
    assert task.split(config) == "val"
