"""The paper's figures: their predictions hold, and a failing one fails the command."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

import pretrain.paper.fig1
from pretrain.__main__ import main


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pretrain", "paper", *words])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


@pytest.mark.slow
@pytest.mark.parametrize(("figure", "count"), [("fig1", 6), ("fig5", 5)])
def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: str, count: int) -> None:
    assert run(monkeypatch, figure, "--out", str(tmp_path)) == 0
    checks = json.loads((tmp_path / f"{figure}.json").read_text())["checks"]
    assert len(checks) == count and all(check["holds"] for check in checks)
    assert (tmp_path / f"{figure}.png").stat().st_size > 10_000
    with (tmp_path / f"{figure}.csv").open() as file:
        assert len(list(csv.DictReader(file))) > 500


@pytest.mark.slow
def test_a_wrong_threshold_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With the levels doubled behind the prediction's back, the closed form no longer fits."""
    descend = pretrain.paper.fig1.descend

    def other(decays: tuple, *more: int, **words: int) -> object:
        return descend(tuple(2 * decay for decay in decays), *more, **words)

    monkeypatch.setattr(pretrain.paper.fig1, "descend", other)
    monkeypatch.setattr(pretrain.paper.fig1, "_draw", lambda *_: None)
    assert run(monkeypatch, "fig1", "--out", str(tmp_path)) == 1
    found = capsys.readouterr()
    assert "FAILS  singular values" in found.out and found.err.startswith("error: fig1: ")
