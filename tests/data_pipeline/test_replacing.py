"""Writers of files and folders: a signal at any moment leaves no temporary one."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import data_pipeline.files
import launchers.launch
import launchers.team
import pretrain.distributed.signals
import pretrain.runs.aside
from data_pipeline.files import write_aside
from launchers.team import run_team
from pretrain.distributed.signals import SIGNALS
from pretrain.runs.aside import whole_folder

FILES, LAUNCH, ASIDE = (
    str(module.__file__) for module in (data_pipeline.files, launchers.launch, pretrain.runs.aside)
)
TEAM, SIGNALS_FILE = str(launchers.team.__file__), str(pretrain.distributed.signals.__file__)
WRITERS: dict[str, tuple[set[str], Callable[[Path], None]]] = {
    "aside": ({FILES}, lambda path: write_aside(path, b"new")),
    "secret": ({LAUNCH}, lambda path: launchers.launch._write_secret(path, "new")),
}


def not_ignored() -> bool:
    return signal.getsignal(signal.SIGTERM) != signal.SIG_IGN


def interrupted(
    files: set[str], write: Callable[[], None], at: int, raises: Callable[[], bool] = not_ignored
) -> bool:
    """Whether a writer has so many traced moments; it is interrupted at this one.

    Moments are opcodes of some files: Python handles a signal between two of them.

    Args:
        raises: whether a signal would raise anything now.
    """
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        code: CodeType = frame.f_code
        if code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and raises():
            seen += 1
            if seen == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        write()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return seen >= at


@pytest.mark.parametrize("writer", WRITERS)
def test_a_signal_at_any_moment_leaves_the_old_file_or_the_new(writer: str, tmp_path: Path) -> None:
    files, write = WRITERS[writer]
    path, at = tmp_path / "x", 1
    kept = set()
    path.write_text("old")
    while interrupted(files, lambda: write(path), at):
        kept.add(path.read_text())
        assert [one.name for one in tmp_path.iterdir()] == ["x"], at
        path.write_text("old")
        at += 1
    assert kept == {"old", "new"} and at > 50


def test_a_signal_at_any_moment_leaves_a_whole_folder_or_none(tmp_path: Path) -> None:
    def work() -> None:
        with whole_folder(tmp_path / "x", "export") as aside:
            (aside / "one").write_text("1")
            (aside / "other").write_text("2")

    at, found = 1, set()
    while True:
        SIGNALS.listen()
        try:
            if not interrupted({ASIDE, FILES}, work, at):
                break
        finally:
            SIGNALS.restore()
        assert {one.name for one in tmp_path.iterdir()} <= {"x"}, at
        found.add(tuple(sorted(one.name for one in tmp_path.rglob("*"))))
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        at += 1
    assert found == {()} and at > 50


def test_a_signal_at_any_moment_leaves_no_meeting_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of processes on this machine; while they run, signals are handed on to them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    command, at = ["/bin/true"], 1
    SIGNALS.listen()
    try:
        while interrupted(
            {TEAM, SIGNALS_FILE}, lambda: print(run_team(command, 1, {})), at,
            lambda: SIGNALS._answer is None,
        ):  # fmt: skip
            assert not list(tmp_path.iterdir()), at
            at += 1
    finally:
        SIGNALS.restore()
    assert at > 20
