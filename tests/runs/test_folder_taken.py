"""One new folder, wanted by training and by a verb that writes other files there."""

from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.corpus import write_corpus
from data_pipeline.files import HeldError, held, locked
from data_pipeline.sources import DataError
from pretrain.cli.paper import _when_free
from pretrain.errors import UsageError
from pretrain.report import write_report
from pretrain.runs.aside import whole_folder
from pretrain.runs.lock import BusyError, RunLock, shared
from tests.tools import assert_one_line
from tests.tools import run as run_words


def test_a_report_keeps_training_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with held(out):
        with pytest.raises(BusyError, match="another process"):
            RunLock(out, patience=0.1).acquire()
        with (
            pytest.raises(BusyError, match="another process"),
            shared(out, {out / "sweep.yaml": b"a"}, "sweep", patience=0.1),
        ):
            pass
        assert not out.exists()


def test_training_waits_for_a_moment(tmp_path: Path) -> None:
    out, order = tmp_path / "out", []

    def report() -> None:
        with held(out):
            holds.set()
            time.sleep(0.3)
            order.append("report")

    holds = threading.Event()
    other = threading.Thread(target=report)
    other.start()
    holds.wait()
    RunLock(out).acquire()
    order.append("training")
    other.join()
    assert order == ["report", "training"]


def test_a_run_goes_on_beside_its_report(tmp_path: Path) -> None:
    """Other commands refuse a run folder, so training need not wait for them."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "run-id").write_text("1")
    with held(out):
        RunLock(out).acquire()


@pytest.mark.usefixtures("small_figures")
@pytest.mark.parametrize("form", ["csv", "png"])
def test_training_keeps_a_report_out(form: str, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = RunLock(out)
    run.acquire()
    with pytest.raises(DataError, match="another process"):
        write_report([trained], out, form)
    run.release()
    assert [file.name for file in out.iterdir()] == [".lock"]
    write_report([trained], out, form)


def test_training_keeps_a_corpus_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = RunLock(out)
    run.acquire()
    with pytest.raises(DataError, match="another process"):
        write_corpus(out)
    assert [file.name for file in out.iterdir()] == [".lock"]
    run.release()


def test_processes_of_one_sweep_share_a_folder(tmp_path: Path) -> None:
    """Of another sweep none comes in beside them, and nothing of theirs is written."""
    out = tmp_path / "out"
    mine = {out / "sweep.json": b"a", out / "recipes" / "x.yaml": b"1"}
    others = ({**mine, out / "sweep.json": b"b"}, {**mine, out / "recipes" / "y.yaml": b"1"})
    with shared(out, mine, "sweep"):
        with shared(out, mine, "sweep"):
            pass
        for other in others:
            with pytest.raises(BusyError, match="another sweep"), shared(out, other, "sweep"):
                pass
            assert {file: file.read_bytes() for file in mine} == mine
    with shared(out, others[0], "sweep"):
        assert {file: file.read_bytes() for file in others[0]} == others[0]


def test_a_report_keeps_an_import_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        held(out),
        pytest.raises(UsageError, match="another process"),
        whole_folder(out, "import", patience=0.1) as aside,
    ):
        (aside / "run-id").write_text("1")
    assert not list(tmp_path.iterdir())
    with whole_folder(out, "import") as aside:
        (aside / "run-id").write_text("1")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_report_keeps_tokens_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with held(out), pytest.raises(DataError, match="another process"), locked(out, patience=0.1):
        pass
    with locked(out):
        assert (out / ".lock").exists()


@pytest.mark.parametrize("out", [".", "x/..", "./y/."])
def test_a_folder_without_a_name(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here/x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    run = RunLock(Path(out))
    run.acquire()
    run.release()
    with held(Path(out)):
        pass
    with locked(Path(out)):
        pass
    assert {path.name for path in tmp_path.rglob("*")} <= {"here", "x", "y", ".lock"}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_in_one_that_cannot_be_written(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume in a container whose own files are read-only."""
    volume = tmp_path / "volume"
    volume.mkdir()
    really = os.open

    def fail(path: Any, *rest: Any, **more: Any) -> int:
        if Path(path).parent == tmp_path:
            raise OSError(number, os.strerror(number), str(path))
        return really(path, *rest, **more)

    monkeypatch.setattr(os, "open", fail)
    run = RunLock(volume)
    run.acquire()
    run.release()
    with locked(volume):
        pass


def test_figures_among_their_runs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for figure in ("fig2", "fig3", "fig3-vit", "modern", "all"):
        assert run_words(monkeypatch, "paper", figure, "--out", "x", "--runs", "./x") == 2
        assert_one_line(capsys.readouterr().err, ("--runs",))
    assert not list(tmp_path.iterdir())


def test_a_link_and_its_folder_are_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "other").symlink_to(tmp_path / "link")
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/folder").symlink_to(tmp_path / "folder")
    (tmp_path / "shortcut").symlink_to("elsewhere/deep")
    around = ("folder", "link", "other", "shortcut/../folder", "folder/.")
    names = [tmp_path / name for name in around]
    for first in names:
        for second in names:
            with (
                held(first),
                pytest.raises(DataError, match="another process is writing"),
                held(second),
            ):
                pass
    assert not any(one.suffix == ".lock" for one in tmp_path.rglob("*"))


def test_links_to_files_and_to_nothing_keep_their_own_names(tmp_path: Path) -> None:
    """Writing replaces such a link, so what it leads to is not written."""
    (tmp_path / "file").write_text("a")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "nowhere").symlink_to("nothing")
    (tmp_path / "itself").symlink_to("itself")
    names = ("file", "link", "nothing", "nowhere", "itself")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(held(tmp_path / name))
        locks = {one.name for one in tmp_path.iterdir() if one.suffix == ".lock"}
    assert locks == {f".{name}.lock" for name in names}


def test_all_figures_wait_for_one_that_is_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pretrain.cli.paper._PAUSE", 0.01)
    busy: list[Exception] = [
        DataError("x: another"), BusyError("run: trains; wait"), HeldError("fig: is written; wait"),
    ]  # fmt: skip

    def make() -> None:
        if busy:
            raise busy.pop()

    with pytest.raises(DataError, match="x: another"):
        _when_free(make)
    assert capsys.readouterr().out == "fig: is written: waiting for it\n"
