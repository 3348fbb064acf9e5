"""Writers of files and folders: a signal at any moment leaves no temporary one."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import data_pipeline.files
import launchers.launch
import pretrain.runs.aside
from data_pipeline.files import write_aside
from pretrain.distributed.signals import SIGNALS
from pretrain.runs.aside import whole_folder

FILES, LAUNCH, ASIDE = (
    str(module.__file__) for module in (data_pipeline.files, launchers.launch, pretrain.runs.aside)
)
WRITERS: dict[str, tuple[set[str], Callable[[Path], None]]] = {
    "aside": ({FILES}, lambda path: write_aside(path, b"new")),
    "secret": ({LAUNCH}, lambda path: launchers.launch._write_secret(path, "new")),
}


def interrupted(files: set[str], write: Callable[[], None], at: int) -> bool:
    """Whether a writer has so many traced moments; it is interrupted at this one.

    Moments are opcodes of some files: Python handles a signal between two of them, unless it is
    ignored.
    """
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        code: CodeType = frame.f_code
        if code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
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
