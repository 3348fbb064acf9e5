"""Lines of metrics that the disk refuses: they wait, in order, and none is written twice."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

import pretrain.runs.metrics
from pretrain.runs.metrics import METRICS, Tracker
from tests.checkpoints import small_config


class Disk:
    """Takes lines, or refuses them."""

    def __init__(self) -> None:
        self.full = False
        self._append = pretrain.runs.metrics._append

    def append(self, path: Path, line: str) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self._append(path, line)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()
    monkeypatch.setattr(pretrain.runs.metrics, "_append", found.append)
    return found


def actions(seed: int) -> list[tuple[str, Any]]:
    """A life of a run: updates, a disk that fills and empties, and ways back."""
    chosen, step, found = random.Random(seed), 0, []
    for _ in range(40):
        kind = chosen.choices(["log", "full", "empty", "retry", "rewind"], [6, 2, 2, 1, 1])[0]
        if kind == "log":
            step += 1
        elif kind == "rewind":
            step = chosen.randint(max(0, step - 6), step)
        found.append((kind, step))
    return found


def lived(run: Path, disk: Disk, seed: int, fills: bool) -> str:
    """The file after a life; with ``fills`` false, the disk always takes everything."""
    run.mkdir()
    tracker = Tracker(run, small_config(), active=True)
    for number, (kind, step) in enumerate(actions(seed)):
        if kind == "log":
            loss = float("nan") if number % 7 == 0 else float(number)  # with an event
            tracker.log("train", step, {"loss": loss})
        elif kind == "rewind":
            tracker.rewind(step)
        elif kind == "retry":
            assert bool(tracker.write_waiting()) == bool(disk.full and tracker._waiting)
        else:
            disk.full = fills and kind == "full"
    disk.full = False
    tracker.close()
    path = run / METRICS
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("part", range(4))
def test_a_disk_that_fills_and_empties(part: int, tmp_path: Path, disk: Disk) -> None:
    for seed in range(50 * part, 50 * part + 50):
        expected = lived(tmp_path / f"{seed}-expected", disk, seed, False)
        assert lived(tmp_path / f"{seed}", disk, seed, True) == expected, seed


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG", "EIO"])
@pytest.mark.parametrize("room", [0, 1, 20, 1000])
def test_a_part_of_a_line_is_taken_back(
    room: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the reason is the disk's own."""
    path, number, left = tmp_path / METRICS, getattr(errno, name), room
    path.write_text("before\n")

    def write(descriptor: int, data: bytes) -> int:
        nonlocal left
        if not left:
            raise OSError(number, os.strerror(number))
        count = original(descriptor, data[:left])
        left -= count
        return count

    original = os.write
    monkeypatch.setattr(os, "write", write)
    if room >= 100:
        pretrain.runs.metrics._append(path, "x" * 100)
        assert path.read_text() == "before\n" + "x" * 100
        return
    with pytest.raises(OSError, match=METRICS) as raised:
        pretrain.runs.metrics._append(path, "x" * 100)
    assert raised.value.errno == number and path.read_text() == "before\n"


def test_lines_that_are_lost_are_counted(
    tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(tmp_path, small_config(), active=True)
    disk.full = True
    for step in range(3):
        tracker.log("train", step, {"loss": 1.0})
    tracker.close()
    waits, lost = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl: No space left on device; lines wait in memory" in waits
    assert lost.endswith("metrics.jsonl: No space left on device; its last lines are lost: 3")
