"""With several processes a failure is one line, as with one: no launcher's page, no traceback."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.tools import base_recipe, pretrain, write_recipe

TORCHRUNS = re.compile(r"={5}|-{5}|torch\.distributed|ChildFailedError|elastic|Traceback|exitcode")
"""What torchrun prints when a process fails."""


def flipped(data: Path, folder: Path) -> Path:
    """A copy of the data with a wrong bit in every file of training tokens."""
    shutil.copytree(data, folder)
    for file in (folder / "train").glob("*.bin"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("code", "culprit", "more"),
    [
        (2, "model.nosuch", ["model.nosuch=1"]),
        (2, "train.global_batch", ["train.global_batch=7"]),
        (2, "does not divide 2", ["grid.tensor_parallel=3"]),
        (1, ".bin", ["data.path=FLIPPED"]),
    ],
    ids=lambda one: str(one)[:20],
)
def test_a_failure_of_two_processes_is_one_line(
    code: int, culprit: str, more: list[str], data: Path, tmp_path: Path
) -> None:
    recipe = str(write_recipe(tmp_path / "recipe.yaml", base_recipe(data)))
    if any("FLIPPED" in word for word in more):
        more = [f"data.path={flipped(data, tmp_path / 'flipped')}"]
    words = ["train", recipe, *more, "--out", str(tmp_path / "run"), "--processes", "2"]
    done = pretrain(*words)
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert culprit in line and done.stderr.endswith(line + "\n")
    assert not TORCHRUNS.search(done.stdout + done.stderr), done.stderr
