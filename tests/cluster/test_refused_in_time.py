"""What a start would refuse is refused by the dry run too, by name, and before a folder is made."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.engine.raw_deepspeed import IMPLIED
from tests.engine.test_raw_deepspeed import nested
from tests.test_project_files import PROJECT
from tests.tools import ROOT, assert_one_line, base_recipe, pretrain, run, write_recipe

pytestmark = pytest.mark.slow

CONTRADICTIONS: dict[str, dict[str, Any]] = {
    f"deepspeed.{key}": {"deepspeed": nested(key, "other")} for key in IMPLIED
}
MISSING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "logging.tensorboard": (
        "torch.utils.tensorboard", "tensorboard", {"logging": {"tensorboard": True}},
    ),
    "logging.wandb": ("wandb", "wandb", {"logging": {"wandb": "project"}}),
    "logging.trackers[0]": (
        "torch.utils.tensorboard", "tensorboard",
        {"logging": {"trackers": [{"kind": "tensorboard"}]}},
    ),
    "optimizer.name": ("pytorch_optimizer", "pytorch-optimizer", {"optimizer": {"name": "lion"}}),
}  # fmt: skip
"""Key: module, package and recipe."""


def said_by_both(
    values: dict[str, Any], data: Path, folder: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> str:  # fmt: skip
    """The one line that both the dry run and the start end with."""
    recipe = write_recipe(folder / "recipe.yaml", {**base_recipe(data), **values})
    words, said = ["train", str(recipe), "--out", str(folder / "run")], []
    for more in (["--dry-run"], []):
        assert run(monkeypatch, *words, *more) == 2
        said.append(capsys.readouterr().err)
    assert not (folder / "run").exists()
    assert said[0] == said[1]
    assert_one_line(said[0], ())
    return said[0]


@pytest.mark.parametrize("key", sorted(CONTRADICTIONS))
def test_a_raw_key_that_contradicts_the_recipe(
    key: str, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    said = said_by_both(CONTRADICTIONS[key], data, tmp_path, monkeypatch, capsys)
    assert f"{key}: 'other' contradicts the recipe" in said


@pytest.mark.parametrize("key", MISSING)
def test_what_needs_a_package_that_is_missing(
    key: str, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    module, package, values = MISSING[key]
    monkeypatch.setitem(sys.modules, module, None)
    said = said_by_both(values, data, tmp_path, monkeypatch, capsys)
    assert f"{key}: " in said and f"pip install {package}\n" in said


def test_offload_without_zero(
    data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    raw = nested("zero_optimization.offload_optimizer.device", "cpu")
    values = {"deepspeed": raw, "grid": {"zero_stage": 0}}
    said = said_by_both(values, data, tmp_path, monkeypatch, capsys)
    assert "deepspeed.zero_optimization.offload_optimizer: has no effect with grid.zero_st" in said


def test_a_batch_that_cannot_be_divided(
    data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    values = {"train": {"steps": 6, "global_batch": 8, "micro_batch": 3}}
    said = said_by_both(values, data, tmp_path, monkeypatch, capsys)
    assert "train.micro_batch: 3 does not divide" in said


def test_data_without_the_split_to_evaluate(
    data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(data, tmp_path / "data")
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    manifest["entries"] = [one for one in manifest["entries"] if one["split"] == "train"]
    del manifest["checksum"]
    (tmp_path / "data/manifest.json").write_text(json.dumps(manifest))
    values = {"data": {"path": str(tmp_path / "data")}}
    said = said_by_both(values, data, tmp_path, monkeypatch, capsys)
    assert "no split 'val'; it has train" in said


def test_processes_that_do_not_fit_the_recipe(data: Path, tmp_path: Path) -> None:
    """The dry run says what a start with as many processes says."""
    values = {**base_recipe(data), "train": {"steps": 6, "global_batch": 8}}
    recipe = str(write_recipe(tmp_path / "recipe.yaml", values))
    start = ("train", recipe, "--out", str(tmp_path / "run"), "--processes", "3")
    divided = pretrain(*start, "--dry-run")
    assert divided.returncode == 2
    assert_one_line(divided.stderr, (
        "train.global_batch: 8 sequences cannot be divided among 3 data-parallel ranks; use a",
    ))  # fmt: skip
    said = []
    for more in (("--dry-run",), ()):
        done = pretrain(*start, "grid.tensor_parallel=2", *more)
        assert done.returncode == 2
        said.append(next(one for one in done.stderr.splitlines() if one.startswith("error: ")))
    assert said[0] == said[1]
    assert "tensor_parallel 2 x pipeline_parallel 1 = 2 does not divide 3 process(es)" in said[0]


def test_the_dry_run_describes_the_grid_of_its_processes(
    data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = str(write_recipe(tmp_path / "recipe.yaml", base_recipe(data)))
    words = ["train", recipe, "grid.tensor_parallel=2", "--dry-run"]
    for more, wanted in (([], 1), (["--processes", "4"], 2)):
        assert run(monkeypatch, *words, *more) == 0
        assert f"grid: tensor 2 x pipeline 1 x data {wanted}, " in capsys.readouterr().out


def test_hints_name_packages_that_exist() -> None:
    """Every `pip install X` that the program prints is of a package that it declares."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    declared = {re.split(r"[<>=\[]", one)[0] for group in groups for one in group}
    declared.add("lightning")  # of those who use its adapter
    hints = [
        (path.name, name)
        for top in ("pretrain", "models", "data_pipeline", "launchers")
        for path in (ROOT / top).rglob("*.py")
        for name in re.findall(r"pip install ([a-z][\w-]+)", path.read_text("utf-8"))
    ]
    assert len(hints) > 5
    assert [hint for hint in hints if hint[1] not in declared] == []
