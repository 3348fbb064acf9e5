"""Metrics go to JSON lines whatever happens to the services beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.config.recipe import Config
from pretrain.runs.metrics import Tracker, read_metrics, rewind_metrics


def config(**logging: object) -> Config:
    return Config.model_validate({"logging": logging})


def test_lines_and_rewinding(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, config(), active=True)
    for step in range(1, 6):
        tracker.log("train", step, {"loss": 1.0 / step})
    tracker.log("evaluation", 5, {"loss": 0.5})
    tracker.close()
    Tracker(tmp_path, config(), active=False).log("train", 6, {"loss": 0.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    rewind_metrics(tmp_path, 3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert read_metrics(tmp_path, "evaluation") == []


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no account there
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(tmp_path, config(wandb="project"), active=True)
    assert tracker._wandb is not None
    tracker.log("train", 1, {"loss": 1.0, "weight_decay": {"query": 0.1}})
    tracker.close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_run_of_wandb_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, fails: bool
) -> None:
    """With the words of 0.31, which takes no ``quiet``; its silence is a setting."""
    finished: list[int | None] = []

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None: ...

        def finish(self, exit_code: int | None = None) -> None:
            finished.append(exit_code)
            if fails:
                raise OSError("no route to host")

    asked: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    standin = SimpleNamespace(
        init=lambda **words: asked.update(words) or Run(),
        Settings=lambda **words: settings.update(words),
    )
    monkeypatch.setitem(sys.modules, "wandb", standin)
    tracker = Tracker(tmp_path, config(wandb="project"), active=True)
    tracker.log("train", 1, {"loss": 1.0})
    tracker.close()
    assert finished == [None] and asked["project"] == "project" and settings["silent"] is True
    said = capsys.readouterr().err
    assert said.count("warning: ") == fails and ("W&B did not finish" in said) == fails


def test_a_dead_service_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb")

    asked: dict[str, Any] = {}

    def refuse(**words: Any) -> None:
        asked.update(words)
        raise OSError("no route to host")

    monkeypatch.setattr(wandb, "init", refuse)
    tracker = Tracker(tmp_path, config(wandb="project", wandb_group="sweep"), active=True)
    tracker.log("train", 1, {"loss": 1.0})
    tracker.close()
    assert asked["group"] == "sweep" and asked["config"]["optimizer"]["weight_decay"]
    assert "no route to host" in capsys.readouterr().err
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0
