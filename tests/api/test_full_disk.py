"""A full disk ends nobody's loop: lines and measurements wait, and the folder is released."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import pretrain.api.folder
import pretrain.ranks.writer
import pretrain.runs.metrics
from pretrain.api import RankProbe
from pretrain.runs.folder import read_ranks
from tests.transformers_models import build

STEPS = 12
PLACES = ((pretrain.runs.metrics, "_append"), (pretrain.ranks.writer, "add_ranks"),
          (pretrain.api.folder, "merge_ranks"))  # fmt: skip


class Disk:
    """Takes what is written while it has room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        for module, name in PLACES:
            monkeypatch.setattr(module, name, self._on_disk(getattr(module, name)))

    def _on_disk(self, write: Any) -> Any:
        def written(*values: Any) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(values[0]))
            write(*values)

        return written


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@contextmanager
def loop(run: Path) -> Iterator[Any]:
    """A loop that trains one matrix, one update at each call."""
    torch.manual_seed(1)
    model = build("gpt2")
    with RankProbe(model, run, steps=STEPS, every=2, log_every=1) as probe:

        def update(step: int) -> None:
            with torch.no_grad():
                next(model.parameters()).mul_(0.9)
            probe.step(step, loss=1.0 / step)

        yield update


def assert_released(run: Path) -> None:
    """Nobody holds the folder: a loop can continue there."""
    probe = RankProbe(build("gpt2"), run, steps=STEPS, every=2, log_every=1)
    probe.begin(2)
    probe.close()
    assert {row["step"] for row in read_ranks(run)} == {0, 2}


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_if_there_is_room_later(seed: int, tmp_path: Path, disk: Disk) -> None:
    for name in ("undisturbed", "disturbed"):
        rng = random.Random(seed)
        with loop(tmp_path / name) as update:
            for step in range(1, STEPS + 1):
                disk.full = name == "disturbed" and rng.random() < 0.6
                update(step)
            disk.full = False
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()
             for name in ("undisturbed", "disturbed")]  # fmt: skip
    assert [line.split('"seconds"')[0] for line in lines[0]] == [
        line.split('"seconds"')[0] for line in lines[1]
    ]
    tables = [pq.read_table(tmp_path / name / "ranks.parquet")
              for name in ("undisturbed", "disturbed")]  # fmt: skip
    assert str(tables[0].to_pylist()) == str(tables[1].to_pylist()) and len(tables[0])


def test_what_is_lost_at_the_end_is_told(
    tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    with loop(tmp_path / "run") as update:
        for step in range(1, STEPS + 1):
            disk.full = step > 9
            update(step)
    error = capsys.readouterr().err
    assert "ranks.parquet: No space left on device; the last measurements are lost: 2" in error
    assert "its last lines are lost: 5" in error
    assert error.count("measurements wait in memory") == 1
    disk.full = False
    assert_released(tmp_path / "run")


def test_a_loop_whose_own_messages_are_refused(tmp_path: Path, disk: Disk) -> None:
    """Its standard error is on the same disk, as in a batch system."""
    stream = Path("/dev/full").open("w", encoding="utf-8", buffering=1)  # noqa: SIM115
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        with loop(tmp_path / "run") as update:
            for step in range(1, STEPS + 1):
                disk.full = step > 5
                update(step)
    with contextlib.suppress(OSError):
        stream.close()
    disk.full = False
    assert_released(tmp_path / "run")


def test_a_table_that_cannot_be_merged_is_still_read(tmp_path: Path, disk: Disk) -> None:
    with loop(tmp_path / "run") as update:
        for step in range(1, STEPS + 1):
            update(step)
        disk.full = True
    assert sorted({row["step"] for row in read_ranks(tmp_path / "run")}) == [*range(0, 13, 2)]
