"""Figures of other settings go to other files; those of the run itself stay as they are."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import stat
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_pipeline.files import write_aside
from pretrain.config.recipe import apply_overrides, parse_config
from pretrain.errors import RunError
from pretrain.offline.evaluate import _words, _write, result_path
from pretrain.runs.folder import resolve_checkpoint
from tests.fake_runs import STEPS, recipe, write_run

pytestmark = pytest.mark.slow

SPLITS = ("test", "val")
STRIDES = (32, 8, 16)
PRECISIONS = ("fp32", "bf16")
LIMITS = (None, 5, 50)
RANKS: tuple[dict[str, Any], ...] = (
    {},
    {"attention_rank": 0.5, "attention_products": ["qk", "vp"]},
    {"attention_rank": "measured", "attention_products": ["vp"]},
)
DATA = ("same", "other")
CONTEXTS = (32, 16)


def figures_of(
    split: str, stride: int, precision: str, limit: int | None, rank: dict[str, Any], data: str,
    context: int, step: int = STEPS,
) -> dict[str, Any]:  # fmt: skip
    return {
        "split": split, "step": step, "precision": precision, "context": context,
        "stride": min(stride, context), "documents_sha256": f"{split}{limit}{data}", **rank,
    }  # fmt: skip


def path_of(run: Path, settings: tuple[Any, ...]) -> Path:
    _, _, _, limit, _, data, context = settings
    figures = figures_of(*settings)
    config = parse_config(recipe())
    folder = run / "checkpoints" / f"step-{STEPS:08d}"
    checkpoint = SimpleNamespace(
        path=folder, step=STEPS, config=config, state={"data": "same", "tokenizer": ""}
    )
    task = SimpleNamespace(identity=data, source=f"/somewhere/{data} data")
    changed = apply_overrides(config, [f"model.context={context}"])
    words = _words(checkpoint, changed, task, limit)  # type: ignore[arg-type]
    return result_path(checkpoint, figures, words)  # type: ignore[arg-type]


EVERY = list(itertools.product(SPLITS, STRIDES, PRECISIONS, LIMITS, RANKS, DATA, CONTEXTS))
OWN: tuple[Any, ...] = ("test", 32, "fp32", None, {}, "same", 32)


def test_every_setting_has_a_file_of_its_own(tmp_path: Path) -> None:
    """Over all combinations: no name twice, and `evaluation.json` for the run's own alone."""

    run = write_run(tmp_path / "run", recipe(), np.random.default_rng(0))
    (run / "evaluation.json").unlink()
    names: dict[Path, Any] = {}
    for settings in EVERY:
        split, stride, precision, limit, rank, data, context = settings
        path = path_of(run, settings)
        key = (split, min(stride, context), precision, limit, str(rank), data, context)
        assert names.setdefault(path, key) == key, path
        assert (path.name == "evaluation.json") == (settings == OWN), settings
        assert path.parent == run
    assert len(names) == len({str(value) for value in names.values()})


@pytest.mark.parametrize("there", EVERY[::37])
def test_nothing_is_replaced_by_other_settings(tmp_path: Path, there: tuple[Any, ...]) -> None:
    """Whatever `evaluation.json` holds, only the same settings may write it again."""

    run = write_run(tmp_path / "run", recipe(), np.random.default_rng(0))
    (run / "evaluation.json").unlink()
    for settings in EVERY[::11]:
        usual = path_of(run, settings)
        usual.write_text(json.dumps(figures_of(*there)))
        path = path_of(run, settings)
        same = figures_of(*there) == figures_of(*settings)
        assert (path == usual) == same and path.exists() == same
        usual.unlink()


def test_two_that_end_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both want `evaluation.json`, with figures of other documents: each has a file."""
    run = write_run(tmp_path / "run", recipe(), np.random.default_rng(0))
    (run / "evaluation.json").unlink()
    checkpoint: Any = SimpleNamespace(
        path=run / "checkpoints" / f"step-{STEPS:08d}", step=STEPS, config=parse_config(recipe())
    )
    both = threading.Barrier(2)

    def slowly(*words: Any) -> Path:
        path = result_path(*words)
        time.sleep(0.3)  # time for the other to choose the same
        return path

    def write(limit: int) -> None:
        both.wait()
        _write(checkpoint, figures_of("test", 32, "fp32", limit, {}, "same", 32), [], None)

    monkeypatch.setattr("pretrain.offline.evaluate.result_path", slowly)
    threads = [threading.Thread(target=write, args=(limit,)) for limit in (5, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [json.loads(path.read_text()) for path in run.glob("evaluation*.json")]
    assert {one["documents_sha256"] for one in found} == {"test5same", "test50same"}


def test_a_checkpoint_before_the_last_step(tmp_path: Path) -> None:

    run = write_run(tmp_path / "run", recipe(), np.random.default_rng(0))
    figures = figures_of(*OWN, step=20)  # type: ignore[misc]
    checkpoint: Any = SimpleNamespace(
        path=run / "checkpoints/step-00000020", step=20, config=parse_config(recipe())
    )
    assert result_path(checkpoint, figures, []) == run / "evaluation-step=20.json"
    checkpoint.path = tmp_path / "kept/step-00000020"  # a copy that is in no run
    assert result_path(checkpoint, figures, []) == (
        tmp_path / "kept/evaluation-step-00000020-step=20.json"
    )


def test_the_command_keeps_the_runs_own(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What training scored (a sample of another split) is there, byte for byte, after others."""
    from tests.tools import run

    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = (folder / "evaluation.json").read_bytes()
    assert json.loads(before)["precision"] == "fp32" and json.loads(before)["context"] == 32
    other = tmp_path / "other data"
    shutil.copytree(data, other)
    for words in (
        [],
        ["--stride", "8"],
        ["--documents", "5"],
        ["--split", "val", "--documents", "6", "--batch", "3"],
        ["--split", "val", "precision=bf16"],
    ):
        files = {path.name for path in folder.iterdir()}
        assert run(monkeypatch, "evaluate", str(folder), *words) == 0
        new = {path.name for path in folder.iterdir()} - files
        assert len(new) == 1, (words, new)
        figures = json.loads((folder / new.pop()).read_text())
        assert figures["precision"] == ("bf16" if "precision=bf16" in words else "fp32")
        assert figures["stride"] == (8 if "--stride" in words else 32)
    assert (folder / "evaluation.json").read_bytes() == before
    count = len(list(folder.glob("evaluation*.json")))
    assert run(monkeypatch, "evaluate", str(folder), "--stride", "8", "--batch", "2") == 0
    assert run(monkeypatch, "evaluate", str(folder), "--data", str(other), "--stride", "8") == 0
    assert len(list(folder.glob("evaluation*.json"))) == count  # the same documents, elsewhere


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Root may write everywhere, so the system's answer is replaced for this folder."""
    from tests.tools import assert_one_line, run

    def measured(*_: Any) -> Any:
        raise RunError("scored")

    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != trained and may(path, mode))
    monkeypatch.setattr("pretrain.offline.evaluate._measure", measured)
    assert run(monkeypatch, "evaluate", str(trained)) == 1
    assert_one_line(capsys.readouterr().err, (f"{trained}: cannot be written", "--out FILE"))
    assert run(monkeypatch, "evaluate", str(trained), "--out", str(tmp_path / "figures")) == 1
    assert "error: scored" in capsys.readouterr().err


def test_a_path_from_inside_a_run_is_of_that_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = resolve_checkpoint(str(trained))
    for folder, word in (
        (newest, "."),
        (newest.parent, newest.name),
        (newest, "../" + newest.name),
    ):
        monkeypatch.chdir(folder)
        found = resolve_checkpoint(word)
        assert found.parent.parent.resolve() == trained.resolve(), (folder, word)
        assert found.name == newest.name


@pytest.mark.skipif(os.geteuid() != 0, reason="making a device takes root")
def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    """As root, `--out /dev/null` would make a file of it."""
    device, stream, pipe = tmp_path / "null", tmp_path / "stdout", tmp_path / "pipe"
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    stream.symlink_to("/proc/self/fd/1")
    os.mkfifo(pipe)
    for path in (device, stream, pipe):
        before = path.lstat()
        with pytest.raises(OSError, match="not a regular file"):
            write_aside(path, b"figures")
        assert path.lstat().st_ino == before.st_ino
    assert len(list(tmp_path.iterdir())) == 3
