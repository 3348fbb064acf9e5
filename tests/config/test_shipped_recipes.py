"""Every recipe of configs/ can be planned and shown as it lies there, before there is data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pretrain.cluster.vocabulary import ASSUMED, CLASSES
from tests.tools import ROOT, run

RECIPES = [
    path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if "model" in yaml.safe_load(path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_without_data(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    task, has_size = values.get("task", {}), "vocabulary_size" in values["model"]
    missing = task.get("kind", "text") == "text" or task.get("source") == "folder"
    for words in (("plan", str(recipe), "--gpus", "2"), ("train", str(recipe), "--dry-run")):
        assert run(monkeypatch, *words, "--json") == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out)
        assert (": there is no data" in shown.err) == (
            missing and not (has_size and "plan" in words)
        )
        assert ("there is no data, so" in shown.err) == (missing and not has_size), shown.err
        assert shown.err.count("warning: ") <= 1 + ("note" in shown.err)
    assert not list(tmp_path.iterdir())


def test_what_is_assumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The assumed size is used, and one of the recipe's own is kept, and not said to be assumed."""
    monkeypatch.chdir(tmp_path)
    text = ROOT / "configs/gpt-tiny.yaml", ASSUMED, "model.num_layers=1"
    images = ROOT / "configs/paper/vit-s16-imagenet.yaml", CLASSES, "model.num_layers=1"
    for recipe, assumed, small in (text, images):
        sizes = []
        for size in (None, assumed, assumed + 1024):
            words = [] if size is None else [f"model.vocabulary_size={size}"]
            assert run(monkeypatch, "train", str(recipe), "--dry-run", "--json", small, *words) == 0
            shown = capsys.readouterr()
            sizes.append(json.loads(shown.out)["parameters"])
            assert ("assumed" in shown.err) == (size is None)
        assert sizes[0] == sizes[1] < sizes[2]


def test_training_needs_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "train", str(ROOT / "configs/gpt-tiny.yaml")) != 0
    assert "data/corpus" in capsys.readouterr().err


def test_data_that_is_there_counts(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(ROOT / "configs/gpt-tiny.yaml")
    words = ("--dry-run", "--json", f"data.path={data}")
    assert run(monkeypatch, "train", recipe, *words) == 0
    shown = capsys.readouterr()
    assert "assumed" not in shown.err and json.loads(shown.out)["data"]["subsets"]
    assert run(monkeypatch, "plan", recipe, f"data.path={data}", "--json", "--show", "1") == 0
    assert "assumed" not in capsys.readouterr().err


@pytest.mark.parametrize("path", ["nowhere", "empty", "file", "file/x", "a" * 300])
def test_a_folder_without_data_is_no_data(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    recipe = str(ROOT / "configs/gpt-tiny.yaml")
    assert run(monkeypatch, "train", recipe, "--dry-run", "--json", f"data.path={path}") == 0
    assert f"data.path: {path}: there is no data" in capsys.readouterr().err
