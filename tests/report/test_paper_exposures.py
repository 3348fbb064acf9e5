"""Which runs of a sweep figures 4 and 6 show, and which they call "without decay"."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pretrain.report.paper.fig4
import pretrain.report.paper.runs
from pretrain.report.paper.fig4 import nearest_exposure, without_decay
from tests.tools import run as command


def runs_of(folder: Path, *exposures: float) -> list[Any]:
    return [SimpleNamespace(path=folder / str(number), exposure=exposure)
            for number, exposure in enumerate(exposures)]  # fmt: skip


def test_unknown_exposures_are_not_the_nearest() -> None:
    runs = runs_of(Path("runs"), math.nan, 0.5, 6.0, 6.0001, math.inf)
    assert nearest_exposure(runs, 8.0) == runs[2:4]


def test_least_exposed_is_not_without_decay() -> None:
    runs = runs_of(Path("runs"), 0.5, math.nan, 8.0)
    assert without_decay(runs) == []
    runs += runs_of(Path("more"), 0.0, 0.0)
    assert without_decay(runs) == runs[3:]


@pytest.mark.parametrize(("least", "count"), [(0.0, 1), (0.5, 0)])
def test_the_command_contrasts_only_runs_without_decay(
    least: float, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict[str, Any]] = []
    runs = runs_of(tmp_path, least, 8.0)
    monkeypatch.setattr(pretrain.report.paper.runs, "load_runs", lambda _: runs)
    monkeypatch.setattr(pretrain.report.paper.fig4, "figure",
                        lambda *_, **more: drawn.append(more))  # fmt: skip
    words = ["--from", str(tmp_path), "--out", str(tmp_path / "out")]
    assert command(monkeypatch, "paper", "fig4", *words) == 0
    assert drawn == [{"contrast": [str(runs[0].path)] * count}]


def test_a_folder_without_a_known_exposure_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = runs_of(tmp_path / "theirs", math.nan, math.nan)
    monkeypatch.setattr(pretrain.report.paper.runs, "load_runs", lambda _: runs)
    words = ["--from", str(tmp_path / "theirs"), "--out", str(tmp_path / "out")]
    assert command(monkeypatch, "paper", "fig4", *words) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'theirs'}: no run has a known exposure" in said
