"""`report --follow`: a page that waits, follows runs while they train, and ends with them."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

import pretrain.report.page
from tests.fake_runs import write_study
from tests.tools import run

LOADS_AGAIN = "location.reload()"


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library that draws is most of a page, and the same in each."""
    monkeypatch.setattr(pretrain.report.page, "plotly_script", lambda: "")


def test_it_waits_follows_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ["attention=0,seed=1", "attention=1,seed=1"]
    write_study(tmp_path / "all", decays=(0.0, 1.0), seeds=(1,))
    write_study(tmp_path / "part", decays=(0.0, 1.0), seeds=(1,), last=20,
                evaluation={"overall": None})  # fmt: skip
    runs, out, pages = tmp_path / "runs", tmp_path / "r.html", []
    (runs / names[0]).mkdir(parents=True)
    shutil.copy(tmp_path / "all/sweep.json", runs)
    shutil.copy(tmp_path / "all" / names[0] / "config.yaml", runs / names[0])

    def sleep(seconds: float) -> None:
        assert seconds == 5.0
        pages.append(out.read_text())
        assert sorted(one.name for one in tmp_path.iterdir()) == ["all", "part", "r.html", "runs"]
        if len(pages) == 2:  # the first measurements
            shutil.copytree(tmp_path / "part" / names[0], runs / names[0], dirs_exist_ok=True)
        if len(pages) == 3:  # one run is finished, the other one has not begun
            shutil.copytree(tmp_path / "all" / names[0], runs / names[0], dirs_exist_ok=True)
        if len(pages) == 4:
            shutil.copytree(tmp_path / "part" / names[1], runs / names[1])
        if len(pages) == 5:
            shutil.copytree(tmp_path / "all" / names[1], runs / names[1], dirs_exist_ok=True)
        assert len(pages) < 8

    monkeypatch.setattr("pretrain.report.follow.sleep", sleep)
    words = ["report", str(runs), "--out", str(out), "--follow", "--every", "5"]
    assert run(monkeypatch, *words) == 0
    pages.append(out.read_text())
    assert len(pages) == 6 and pages[0] == pages[1]
    assert "nothing was measured yet" in pages[0] and all(LOADS_AGAIN in one for one in pages[:-1])
    assert "1 run in 1 condition" in pages[2] and "20 of 40 steps" in pages[2]
    assert "not finished" in pages[4] and "2 runs in 2 conditions" in pages[4]
    assert LOADS_AGAIN not in pages[-1] and "not finished" not in pages[-1]
    said = capfd.readouterr().err
    assert said.count("nothing was measured yet") == 1 and "Traceback" not in said


def test_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last page is whole, and nothing else is left."""
    runs = write_study(tmp_path / "runs", decays=(0.0,), seeds=(1,), last=20)
    monkeypatch.setattr(
        "pretrain.report.follow.sleep", lambda _: signal.raise_signal(signal.SIGINT)
    )
    assert (
        run(monkeypatch, "report", str(runs), "--out", str(tmp_path / "r.html"), "--follow") == 130
    )
    assert "interrupted" in capfd.readouterr().err
    assert (tmp_path / "r.html").read_text().endswith("</html>")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["r.html", "runs"]


@pytest.mark.parametrize(("words", "part"), [
    (["runs", "--format", "pdf"], "--follow"), (["nowhere"], "no such run folder"),
    (["runs", "--band", "layers"], "--band"), (["runs", "--out", "runs/attention=0,seed=1"], "run"),
    (["runs", "--every", "0"], "--every"),
])  # fmt: skip
def test_wrong_words(
    words: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    runs = write_study(tmp_path / "runs", decays=(0.0,), seeds=(1,), last=20)
    (runs / "attention=0,seed=1/run-id").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "report", *words, "--follow") in (1, 2)
    assert part in capfd.readouterr().err.strip().splitlines()[-1]
