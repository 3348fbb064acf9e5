"""Metrics go to JSON lines whatever happens to the services beside them."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.config.recipe import Config, load_config
from pretrain.runs.metrics import Tracker, read_metrics, rewind_metrics
from pretrain.runs.service import SERVICES, coloured
from tests.own_code import write_example
from tests.tools import ROOT, write_recipe


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


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no account there
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(tmp_path, config(wandb="project"), active=True)
    assert [name for name, *_ in tracker._services] == ["W&B"]
    tracker.log("train", 1, {"loss": 1.0, "weight_decay": {"query": 0.1}})
    tracker.close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_run_of_wandb_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    """With the words of 0.31, which takes no ``quiet``; its silence is a setting."""
    finished: list[int | None] = []

    class Run:
        def log(self, values: dict[str, Any]) -> None: ...

        def define_metric(self, name: str, **words: Any) -> None: ...

        def finish(self, exit_code: int | None = None) -> None:
            finished.append(exit_code)
            if fails:
                raise OSError("no route to host")

    asked: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    standin = SimpleNamespace(
        Image=None,
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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


MAPS = {"rank_by_head/W_QK": [[0.0, 1.0, math.nan], [0.5, 0.25, 0.75]]}


def log_some(tracker: Tracker) -> None:
    by_layer = {f"{product}_layer_{layer:02d}": layer / 20 + (product == "vp")
                for layer in range(12) for product in ("vp", "qk")}  # fmt: skip
    tracker.log("train", 5, {"loss": 1.5, "weight_decay": {"query": 0.5}})
    tracker.log("ranks", 5, {"pseudo_rank_qk": 0.25, "rank_by_layer": by_layer})
    tracker.show(MAPS, 5)
    tracker.close()


def test_real_tensorboard(tmp_path: Path) -> None:
    """Ranks by layer sort by layer, and a map has the colours of its values."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker(tmp_path, config(tensorboard=True), active=True)
    assert [name for name, *_ in tracker._services] == ["TensorBoard"]
    log_some(tracker)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    tags = read.Tags()
    layers = sorted(tag for tag in tags["scalars"] if tag.startswith("rank_by_layer/qk"))
    assert [read.Scalars(tag)[0].value for tag in layers] == pytest.approx(
        [layer / 20 for layer in range(12)]
    )
    assert {"train/loss", "weight_decay/query", "ranks/pseudo_rank_qk"} <= set(tags["scalars"])
    (image,) = read.Images("rank_by_head/W_QK")
    assert (image.width, image.height, image.step) == (48, 32, 5)
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
    assert (pixels == coloured(MAPS["rank_by_head/W_QK"])).all()


@pytest.mark.long  # W&B's own process takes ten seconds
def test_real_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(tmp_path, config(wandb="project"), active=True)
    tracker.log("train", 7, {"loss": 1.25})
    log_some(tracker)  # of update 5: a measurement that is finished later
    (images,) = (tmp_path / "wandb").glob("offline-run-*/files/media/images/rank_by_head")
    (image,) = images.glob("W_QK_*.png")
    pixels = np.asarray(Image.open(image).convert("RGB"))
    assert (pixels == coloured(MAPS["rank_by_head/W_QK"])).all()
    (stored,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    for name in (b"weight_decay/query", b"rank_by_layer/qk_layer_11", b"train/loss"):
        assert name in stored.read_bytes()


def test_colours_are_in_order_of_the_values() -> None:
    image = coloured([[0.0, 0.5, 1.0, math.nan]]).astype(int)
    assert image.shape == (16, 64, 3)
    lightness = image[0, ::16].sum(axis=1)
    assert lightness[0] < lightness[1] < lightness[2]
    assert len(set(image[0, 48])) == 1  # grey: not finite


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_make_setup_installs_what_a_service_needs(kind: str) -> None:
    entry = {"kind": kind} | ({"project": "p"} if kind == "wandb" else {})
    package = SERVICES.class_of(config(trackers=[entry]).logging.services()[0]).needs[1]
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"-e '\.\[([\w,]+)\]'", (ROOT / "Makefile").read_text())[0].split(",")
    wanted = [one for extra in extras for one in about["optional-dependencies"][extra]]
    assert package == kind and any(re.match(rf"{package}\b", one) for one in wanted)


# --- a user's own -----------------------------------------------------------------------------


def own(folder: Path, *entries: dict[str, Any]) -> Config:
    """A recipe with trackers of the user's own, read as `pretrain train` does."""
    recipe = write_recipe(folder / "r.yaml", {"logging": {"trackers": list(entries)}})
    return load_config(recipe, code=[])


def test_a_tracker_of_docs_extending(tmp_path: Path) -> None:
    write_example(tmp_path)
    found = own(tmp_path, {"kind": "table.py:Table", "file": "train.csv"})
    tracker = Tracker(tmp_path, found, active=True)
    tracker.log("train", 1, {"loss": 2.5})
    tracker.log("evaluation", 1, {"loss": 9.0})
    tracker.rewind(0)
    tracker.log("train", 1, {"loss": 2.25})
    tracker.close()
    assert (tmp_path / "train.csv").read_text().split() == ["1,2.5", "1,2.25"]
    Tracker(tmp_path, found, active=False).log("train", 2, {"loss": 0.0})
    assert (tmp_path / "train.csv").read_text().count("\n") == 2


BASE = """from pretrain.runs.service import Service, ServiceSection


class Mine(Service):
    def log(self, numbers, step):
        {log}
"""
FAILURES = {
    "its start": (
        BASE.format(log="pass") + "\n    def __init__(self, config, run):\n        1 / 0\n",
        "mine.py:9: ZeroDivisionError"),
    "a line": (BASE.format(log="numbers['none']"), "mine.py:6: KeyError"),
    "going back": (BASE.format(log="pass") + "\n    def rewind(self, step):\n        1 / 0\n",
                   "mine.py:9: ZeroDivisionError"),
    "its end": (BASE.format(log="pass") + "\n    def close(self):\n        1 / 0\n",
                "mine.py:9: ZeroDivisionError"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_a_tracker_that_fails_stops_alone(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One warning with the place in the user's file; every other line is written."""
    text, place = FAILURES[case]
    write_example(tmp_path)
    (tmp_path / "mine.py").write_text(text)
    entries = {"kind": "mine.py:Mine"}, {"kind": "table.py:Table"}
    tracker = Tracker(tmp_path, own(tmp_path, *entries), active=True)
    for step in (1, 2):
        tracker.log("train", step, {"loss": 1.0})
    tracker.rewind(1)
    tracker.log("train", 2, {"loss": 0.5})
    tracker.close()
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 0.5]
    assert (tmp_path / "losses.csv").read_text().split() == ["1,1.0", "2,1.0", "2,0.5"]
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "mine.py:Mine" in said and place in said


@pytest.mark.parametrize(("text", "culprit"), [
    (BASE.format(log="pass").replace("def log", "def logs"), "has no method log"),
    (BASE.format(log="pass").replace("numbers, step", "numbers"), "log(self, numbers, step)"),
    (BASE.format(log="pass").replace("(Service)", ""), "pretrain.runs.service.Service"),
])  # fmt: skip
def test_a_tracker_that_is_none_is_refused(text: str, culprit: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=r"logging\.trackers\[0\]\.kind: ") as error:
        own(tmp_path, {"kind": "mine.py:Mine"})
    assert culprit in str(error.value) and "\n" not in str(error.value)


def test_the_shorthands_are_entries_of_the_list() -> None:
    short = config(wandb="p", wandb_group="g", tensorboard=True)
    entries = [{"kind": "wandb", "project": "p", "group": "g"}, {"kind": "tensorboard"}]
    assert short.logging.services() == config(trackers=entries).logging.services()
