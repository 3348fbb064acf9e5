"""What lies in the place of a lock file: every verb that locks says so in one line."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.errors import RunError
from pretrain.runs.lock import RunLock, is_busy
from tests.tools import assert_one_line, base_recipe, run, write_recipe


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listener(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # such a name has at most 108 bytes
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


def folder(path: Path) -> None:
    path.mkdir()


def link(path: Path) -> None:
    path.symlink_to("/dev/zero")


ODD = [pipe, listener, folder, link]
IN_FOLDER = ("train", "sweep", "demo", "data tokenize")
"""Verbs that lock a file in their folder; the others lock one beside it."""


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("verb", [
    "train", "sweep", "demo", "data corpus", "data tokenize", "data tokenizer", "report", "ranks",
    "evaluate", "launch", "paper fig1"])  # fmt: skip
def test_no_lock_file(
    verb: str, odd: Callable[[Path], None], trained: Path, corpus: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = str(write_recipe(tmp_path / "recipe.yaml", base_recipe(data)))
    values = {"recipe": "recipe.yaml", "grid": {"optimizer.learning_rate": [0.1]}, "seeds": [1]}
    out, words = tmp_path / "out", verb.split()
    words += {
        "train": [recipe],
        "sweep": [str(write_recipe(tmp_path / "sweep.yaml", values))],
        "data tokenize": [str(corpus), "--tokenizer", str(data / "tokenizer.model")],
        "data tokenizer": [str(corpus), "--vocab-size", "300"],
        "launch": [recipe, "--on", "kubernetes", "--site",
                   str(write_recipe(tmp_path / "site.yaml", {"container": {"image": "i"}}))],
        "report": [str(trained)], "ranks": [str(trained)], "evaluate": [str(trained)],
    }.get(verb, [])  # fmt: skip
    words += ["--out", str(out)]
    if verb in IN_FOLDER:
        out.mkdir()
        lock = out / ".lock"
    else:
        lock = tmp_path / ".out.lock"
        if verb == "paper fig1":
            out.mkdir()
            lock = out / ".fig1.lock"
        if verb == "launch":
            out.mkdir()
            lock = out / ".launch.lock"
    odd(lock)
    mode = os.lstat(lock).st_mode
    assert run(monkeypatch, *words) in (1, 2)
    assert_one_line(capfd.readouterr().err, (str(tmp_path),))
    assert os.lstat(lock).st_mode == mode


@pytest.mark.parametrize("odd", ODD)
def test_whether_somebody_trains(odd: Callable[[Path], None], tmp_path: Path) -> None:
    """A question that waits for nobody."""
    odd(tmp_path / ".lock")
    with pytest.raises(OSError, match=r"\.lock"):
        is_busy(tmp_path)
    with pytest.raises((OSError, RunError), match=str(tmp_path)):
        RunLock(tmp_path).acquire()
    shutil.rmtree(tmp_path)
