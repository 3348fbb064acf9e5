"""Two processes that write one folder, and processes that are killed while they write."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.reader import Checkpoint, list_checkpoints
from pretrain.errors import UsageError
from pretrain.runs.aside import whole_folder
from tests.foreign import LLAMA, llama_tensors, write_model
from tests.tools import ROOT, assert_one_line, base_recipe, run, run_processes, write_recipe

Answers = list[list[dict[str, Any]]]


def together(rounds: list[list[dict[str, Any]]], folder: Path) -> Answers:
    """What became of commands that were started at one moment, round by round."""
    request, answer = folder / "rounds.json", folder / "answers.json"
    request.write_text(json.dumps({"asked": rounds, "answer": str(answer)}))
    script = ROOT / "tests" / "together.py"
    done = run_processes([str(request)], 1, timeout=500, script=script)
    assert done.returncode == 0, done.stderr
    ends: list[list[dict[str, Any]]] = json.loads(answer.read_text())
    return ends


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one shape whose weights are told apart."""
    folder = tmp_path_factory.mktemp("models")
    return [
        write_model(folder / name, {key: sign * one for key, one in llama_tensors().items()})
        for name, sign in (("one", 1.0), ("other", -1.0))
    ]


@pytest.fixture(scope="module")
def two_runs(
    two_models: list[Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """The models as runs."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = write_recipe(folder / "recipe.yaml", base_recipe(data))
    monkeypatch = pytest.MonkeyPatch()
    for one in two_models:
        words = ["import", str(one), str(recipe), "--out", str(folder / one.name)]
        assert run(monkeypatch, *words) == 0
    monkeypatch.undo()
    return [folder / one.name for one in two_models]


def sign_of_run(run_folder: Path) -> float:
    """Which of the two models a run holds, in every tensor."""
    (path,) = list_checkpoints(run_folder / "checkpoints")
    checkpoint, wanted = Checkpoint(path), llama_tensors()["model.norm.weight"]
    found = checkpoint.full("final_norm.weight")
    sign = float((found / wanted).mean())
    head = llama_tensors()["lm_head.weight"]
    assert torch.equal(checkpoint.full("head.weight")[: len(head)], sign * head)
    assert torch.equal(found, sign * wanted)
    return sign


def sign_of_export(folder: Path) -> float:
    """Which of the two models an exported folder holds, in its file or in every shard."""
    index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    assert {file.name for file in folder.glob("*.safetensors")} == files
    found: dict[str, torch.Tensor] = {}
    for name in files:
        found |= load_file(folder / name)
    wanted = llama_tensors()
    signs = {float(torch.sign((found[name] * wanted[name]).sum())) for name in wanted}
    assert found.keys() == wanted.keys() and len(signs) == 1
    return signs.pop()


def check_pairs(answers: Answers, names: list[str], outs: list[Path]) -> list[int]:
    """One of two has the folder, the other says so in one line; returns who won."""
    winners = []
    for answer, out in zip(answers, outs, strict=True):
        codes = [one["code"] for one in answer]
        assert sorted(codes) == [0, 2], answer
        assert_one_line(answer[codes.index(2)]["stderr"], (str(out), "not empty"))
        assert "Traceback" not in answer[codes.index(0)]["stderr"]
        winners.append(codes.index(0))
        assert sorted(one.name for one in out.parent.iterdir() if out.name in one.name) == [
            out.name
        ]
    return winners


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.long)])
def test_two_imports_into_one_folder(
    count: int, two_models: list[Path], data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    outs = [tmp_path / f"run{number}-" for number in range(count)]
    rounds = [
        [{"words": ["import", str(one), str(recipe), "--out", str(out)]} for one in two_models]
        for out in outs
    ]
    winners = check_pairs(together(rounds, tmp_path), ["one", "other"], outs)
    assert [sign_of_run(out) for out in outs] == [1.0 - 2 * winner for winner in winners]


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.long)])
def test_two_exports_into_one_folder(count: int, two_runs: list[Path], tmp_path: Path) -> None:
    outs = [tmp_path / f"model{number}-" for number in range(count)]
    rounds = [
        [{"words": ["export", str(one), "--out", str(out)]} for one in two_runs] for out in outs
    ]
    winners = check_pairs(together(rounds, tmp_path), ["one", "other"], outs)
    assert [sign_of_export(out) for out in outs] == [1.0 - 2 * winner for winner in winners]
    for out, winner in zip(outs, winners, strict=False):
        assert two_runs[winner].name in (out / "README.md").read_text()


@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.long)])
def test_what_a_kill_leaves(count: int, two_models: list[Path], data: Path, tmp_path: Path,
                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The whole run or none under its name, at whatever moment; the next import has its way."""
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    rng = random.Random(1)
    outs = [tmp_path / f"run{number}-" for number in range(count)]
    rounds = [
        [{"words": ["import", str(two_models[0]), str(recipe), "--out", str(out)],
          "kill_after": rng.uniform(0.0, 0.35)}]
        for out in outs
    ]  # fmt: skip
    answers = together(rounds, tmp_path)
    assert any(answer[0]["code"] == -9 for answer in answers)
    for out in outs:
        if out.exists():
            assert sign_of_run(out) == 1.0
    lost = [out for out in outs if not out.exists()]
    assert lost
    words = ["import", str(two_models[1]), str(recipe), "--out", str(lost[-1])]
    assert run(monkeypatch, *words) == 0
    assert sign_of_run(lost[-1]) == -1.0


def test_a_folder_is_moved_into_place_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing has the name before the end; files of others stay; leftovers are told."""
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="not empty"), whole_folder(out, "export") as aside:
        assert not out.exists() and aside.parent == tmp_path
        (aside / "mine").write_text("mine")
        out.mkdir()
        (out / "theirs").write_text("theirs")
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
    assert (out / "theirs").read_text() == "theirs"
    with pytest.raises(UsageError, match="not empty"), whole_folder(out, "export"):
        raise AssertionError("a folder that is taken is not written")
    (tmp_path / ".new.export-0123").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").symlink_to(tmp_path / "empty")
    with whole_folder(tmp_path / "new", "export") as aside:
        (aside / "mine").write_text("mine")
        with whole_folder(tmp_path / "second", "export"):
            pass
    assert (tmp_path / "empty/mine").exists() and (tmp_path / "new").is_symlink()
    with whole_folder(tmp_path / "new2", "export"):
        pass
    assert capsys.readouterr().err == ""
    with whole_folder(tmp_path / "again", "export"):
        pass
    (tmp_path / ".third.export-77").mkdir()
    with whole_folder(tmp_path / "third", "export"):
        pass
    assert "left by a killed process" in capsys.readouterr().err
    file = tmp_path / "file"
    file.write_text("theirs")
    with pytest.raises(UsageError, match="not empty"), whole_folder(file, "export"):
        pass
    assert file.read_text() == "theirs" and LLAMA


def test_a_failed_write_leaves_nothing(two_runs: list[Path], data: Path, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    import pretrain.offline.export
    import pretrain.offline.import_model

    def full(*words: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrain.offline.export, "write_tensors", full)
    monkeypatch.setattr(pretrain.offline.import_model, "write_tensors", full)
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    model = write_model(tmp_path / "model", llama_tensors())
    for words in (["export", str(two_runs[0])], ["import", str(model), str(recipe)]):
        assert run(monkeypatch, *words, "--out", str(tmp_path / "out")) == 1
        assert sorted(one.name for one in tmp_path.iterdir()) == ["model", "recipe.yaml"]
