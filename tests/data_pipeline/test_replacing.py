"""A file that is replaced: a signal at any line of the writer leaves no temporary file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import data_pipeline.files
import launchers.launch
from data_pipeline.files import write_aside

WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "aside": (data_pipeline.files.__file__, lambda path: write_aside(path, b"new")),
    "secret": (launchers.launch.__file__, lambda path: launchers.launch._write_secret(path, "new")),
}


def interrupted(file: str, write: Callable[[], None], at: int) -> bool:
    """Whether a writer has so many traced moments; it is interrupted at this one.

    Moments are opcodes of one module: Python handles a signal between two of them.
    """
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        code: CodeType = frame.f_code
        if code.co_filename != file:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
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
    file, write = WRITERS[writer]
    path, at = tmp_path / "x", 1
    kept = set()
    path.write_text("old")
    while interrupted(file, lambda: write(path), at):
        kept.add(path.read_text())
        assert [one.name for one in tmp_path.iterdir()] == ["x"], at
        path.write_text("old")
        at += 1
    assert kept == {"old", "new"} and at > 50
