"""Some hundred endings of commands on a busy machine, good and bad: none aborts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.tools import ROOT, base_recipe, environment, write_recipe

TIMES = 25
AT_ONCE = 3 * (os.cpu_count() or 2)


def cases(folder: Path, data: Path, trained: Path) -> dict[str, tuple[int, list[str]]]:
    """By name: the code, and the words, where OUT stands for a path that nobody has."""
    recipe = str(write_recipe(folder / "recipe.yaml", base_recipe(data)))
    flipped = folder / "flipped"
    shutil.copytree(data, flipped)
    for file in (flipped / "train").glob("*.bin"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    train = ["train", recipe, "--out", "OUT"]
    return {
        "train": (0, train),
        "train, two": (0, [*train, "--processes", "2"]),
        "train, done": (0, ["train", recipe, "--out", str(trained)]),
        "train, flipped bit": (1, [*train, f"data.path={flipped}"]),
        "train, flipped bit, two": (1, [*train, f"data.path={flipped}", "--processes", "2"]),
        "train, wrong key": (2, [*train, "model.nosuch=1", "--processes", "2"]),
        "train, wrong batch": (2, [*train, "train.micro_batch=3"]),
        "evaluate": (0, ["evaluate", str(trained), "--out", "OUT"]),
        "evaluate, wrong stride": (2, ["evaluate", str(trained), "--stride", "999"]),
        "ranks": (0, ["ranks", str(trained), "--out", "OUT"]),
        "export": (0, ["export", str(trained), "--out", "OUT"]),
        "doctor, two": (0, ["doctor", recipe, "--out", "OUT", "--processes", "2"]),
        "report": (0, ["report", str(trained), "--out", "OUT"]),
    }


@pytest.mark.long
def test_no_ending_is_an_abort(data: Path, trained: Path, tmp_path: Path) -> None:
    found = cases(tmp_path, data, trained)
    jobs = [(name, turn) for turn in range(TIMES) for name in found]

    def end(job: tuple[str, int]) -> tuple[str, int, str]:
        name, turn = job
        out = tmp_path / f"{name}-{turn}".replace(" ", "")
        words = [str(out) if word == "OUT" else word for word in found[name][1]]
        done = subprocess.run(
            [sys.executable, "-m", "pretrain", *words], env=environment(), cwd=ROOT, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        if out.is_dir():
            shutil.rmtree(out)
        return name, done.returncode, done.stderr

    with ThreadPoolExecutor(AT_ONCE) as pool:
        ended = list(pool.map(end, jobs))
    wrong = [(name, code, text[-500:]) for name, code, text in ended if code != found[name][0]]
    aborted = [text for _, _, text in ended if "terminate called" in text or "Fatal" in text]
    assert not wrong and not aborted, (Counter(name for name, *_ in wrong), wrong[:3])
    assert len(ended) == TIMES * len(found)
