"""How often a run sees its data: against counted samples, and said where a person looks."""

from __future__ import annotations

import csv
import json
import random
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

from data_pipeline.dataset import TrainingData
from data_pipeline.manifest import load_manifest
from pretrain.config.recipe import parse_config
from pretrain.report import write_report
from pretrain.runs.metrics import Tracker
from pretrain.tasks.epochs import in_words, uses_of
from pretrain.tasks.tasks import open_task
from pretrain.tasks.text import Text
from tests.tools import base_recipe, run, write_recipe


@pytest.mark.parametrize("seed", range(5))
def test_uses_are_what_is_drawn(data: Path, seed: int) -> None:
    """Tokens of each subset: those of the samples that training draws, to a sample or two."""
    rng = random.Random(seed)
    manifest = load_manifest(data)
    entries = {entry.subset: entry for entry in manifest.split("train")}
    weights: Any = {name: rng.choice([0.0, 0.2, 1.0, 5.0]) for name in entries}
    weights = weights if any(weights.values()) else "proportional"
    values = base_recipe(data)
    values["data"]["weights"] = weights
    values["train"] = {"steps": rng.randint(1, 300), "global_batch": rng.randint(1, 16)}
    config = parse_config(values)
    found = uses_of(Text(manifest), config)
    count = config.train.steps * config.train.global_batch
    drawn = TrainingData(manifest, weights, 32, 7, count)
    numbers = np.bincount(
        [drawn._blend.place(i)[0] for i in range(count)], minlength=len(drawn.shares)
    )
    wanted = dict(zip(drawn.shares, numbers.tolist(), strict=True))
    assert found.keys() == entries.keys()
    for name, use in found.items():
        assert use["corpus"] == entries[name].tokens
        assert abs(use["seen"] - 32 * wanted.get(name, 0)) <= 2 * 32
        assert use["epochs"] == pytest.approx(use["seen"] / entries[name].tokens, rel=1e-5)


def test_many_epochs_are_said(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A corpus seen a thousand times: in the dry run, its JSON, and in words."""
    values = base_recipe(data)
    tokens = sum(entry.tokens for entry in load_manifest(data).split("train"))
    values["train"] = {"steps": 100, "global_batch": 1000 * tokens // (100 * 32)}
    recipe = write_recipe(tmp_path / "r.yaml", values)
    assert run(monkeypatch, "train", str(recipe), "--dry-run") == 0
    assert "1e+03 epochs" in capsys.readouterr().out
    assert run(monkeypatch, "train", str(recipe), "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)["data"]
    assert found["unit"] == "tokens" and len(found["subsets"]) == 3
    assert all(900 < use["epochs"] < 1100 for use in found["subsets"].values())
    uses = {f"s{i}": {"corpus": 10.0, "seen": 10.0 * i, "epochs": float(i)} for i in range(9)}
    assert in_words(uses, "tokens") == (
        "360 tokens of 90: 4 epochs (s8 8, s7 7, s6 6, s5 5, s4 4, s3 3, ...)"
    )


def test_images_and_made_up_samples() -> None:
    values = base_recipe(Path("/nowhere"))
    values["task"] = {"kind": "recall", "pairs": 4, "symbols": 8}
    values["model"]["context"] = 9
    config = parse_config(values)
    assert uses_of(open_task(config), config) == {}
    values = base_recipe(Path("/nowhere"))
    values["task"] = {"kind": "images", "source": "digits"}
    values["model"] = {"dialect": "vit", "num_layers": 1, "hidden_size": 32,
                       "num_attention_heads": 4, "image_size": 8, "patch_size": 2,
                       "image_channels": 1}  # fmt: skip
    config = parse_config(values)
    task = open_task(config)
    (use,) = uses_of(task, config).values()
    assert use["seen"] == 48 and use["corpus"] == len(task._train.labels)  # type: ignore[attr-defined]


def test_the_run_folder_and_the_report_say_it(trained: Path, tmp_path: Path) -> None:
    data = json.loads((trained / "environment.json").read_text())[-1]["data"]
    assert data["unit"] == "tokens"
    assert sum(use["seen"] for use in data["subsets"].values()) == pytest.approx(6 * 8 * 32, abs=3)
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    write_report([trained], tmp_path / "csv", "csv")
    rows = list(csv.DictReader((tmp_path / "csv" / "data.csv").open()))
    assert {row["subset"]: float(row["epochs"]) for row in rows} == {
        name: use["epochs"] for name, use in data["subsets"].items()
    }
    environment = list(csv.DictReader((tmp_path / "csv" / "environment.csv").open()))
    assert "data" not in {row["what"] for row in environment}
    # Runs of older versions do not say it.
    starts = json.loads((other / "environment.json").read_text())
    (other / "environment.json").write_text(
        json.dumps([{k: start[k] for k in start if k != "data"} for start in starts])
    )
    write_report([other], tmp_path / "other-csv", "csv")
    assert not (tmp_path / "other-csv" / "data.csv").exists()


class Board:
    """Stands for TensorBoard's writer: what a reader sees, with purged steps hidden."""

    shown: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        if purge_step is not None:
            Board.shown = [(name, step) for name, step in Board.shown if step < purge_step]

    def add_scalar(self, name: str, value: float, step: int) -> None:
        Board.shown.append((name, step))

    def close(self) -> None:
        """Nothing to flush."""


@pytest.mark.parametrize("seed", range(8))
def test_tensorboard_never_runs_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Starts, kills, resumes and rewinds in any order leave every step once, in order."""
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Board  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Board.shown = []
    values = base_recipe(Path("/nowhere"))
    values["logging"] = {"tensorboard": True}
    config, rng = parse_config(values), random.Random(seed)
    step, saved = 0, 0
    for _ in range(6):
        step = saved
        tracker = Tracker(tmp_path, config, True, step)
        if not step:
            tracker.log("ranks", 0, {"x": 1.0})
        for _ in range(rng.randint(1, 12)):
            step += 1
            tracker.log("train", step, {"loss": 1.0})
            if step % 4 == 0:
                saved = step
            elif rng.random() < 0.2:
                step = saved
                tracker.rewind(step)
                if not step:
                    tracker.log("ranks", 0, {"x": 1.0})
        if rng.random() < 0.5:
            tracker.close()
    steps = [at for name, at in Board.shown if name == "train/loss"]
    assert steps == list(range(1, step + 1))
    assert [at for name, at in Board.shown if name == "ranks/x"] == [0]
