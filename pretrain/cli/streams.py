"""Standard streams: any text can be written, messages end nothing, and results are whole."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TextIO

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ESTALE, errno.EROFS)
"""Errors of a full or lost disk under a log file, and of a terminal that has gone."""
_IN_FOLDERS = {
    ("train",), ("sweep",), ("export",), ("import",), ("report",), ("launch",), ("demo",),
    ("paper",), ("data", "corpus"), ("data", "tokenizer"), ("data", "tokenize"), ("data", "adopt"),
}  # fmt: skip
"""Verbs whose result is a file or a folder; what they print says where it is."""
_PRINTED = {"--json", "--dry-run", "--print", "--help", "-h", "--version"}
"""Options with which every verb prints its result."""

_write_some = io.FileIO.write
"""Writes as many bytes as the disk takes."""


class MessageFile(io.FileIO):
    """The file of standard error; it drops messages that the disk or the terminal refuses.

    A batch system puts standard error into a file, often on the disk of the run. If this disk is
    full, the work goes on. The first message after that says how much is missing.
    """

    def __init__(self, descriptor: int, encoding: str = "utf-8", drops: bool = True) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._encoding, self._drops, self._dropped = encoding, drops, 0

    def write(self, data: Any) -> int:
        """Write bytes, all of them, with and without a buffer above this file; the count of those
        that were written or dropped."""
        whole = memoryview(data).cast("B")
        left = whole
        try:
            if self._dropped:
                text = f"\nwarning: {self._dropped} bytes of messages could not be written here\n"
                mark = len("".encode(self._encoding))  # of the byte order, at the file's beginning
                self._write_all(memoryview(text.encode(self._encoding)[mark:]))
                self._dropped = 0
            while left:  # a disk that fills takes a part first
                left = left[self._write_part(left) :]
        except OSError as error:
            if error.errno not in _REFUSED or not self._drops:
                raise
            self._dropped += len(left)
        return len(whole)

    def _write_all(self, data: memoryview) -> None:
        while data:
            data = data[self._write_part(data) :]

    def _write_part(self, data: memoryview) -> int:
        """Write some bytes; wait for a pipe that is full and does not make its writer wait."""
        while (taken := _write_some(self, data)) is None:
            select.select([], [self.fileno()], [])
        return taken


class ResultFile(MessageFile):
    """The file of standard output, whose errors name it."""

    def __init__(self, descriptor: int, encoding: str = "utf-8", drops: bool = False) -> None:
        """
        Args:
            drops: whether what the disk refuses is only missed, as the result is in a folder.
        """
        super().__init__(descriptor, encoding, drops)

    def write(self, data: Any) -> int:
        """Write bytes; the count of those that were written or dropped."""
        missing = self._dropped
        try:
            count = super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from None
        if self._dropped and not missing:
            text = "warning: standard output cannot be written; the results are in their files"
            print(text, file=sys.stderr)
        return count


def set_up_streams(words: Sequence[str] = ()) -> None:
    """Let the standard streams of a command write any text, and name or drop what is refused.

    Characters that the encoding lacks are written as escapes. A stream that the caller has closed
    takes everything and keeps nothing.

    Args:
        words: of the command line, which tell whether the result is printed.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # else messages would go to the other one
            setattr(sys, name, _nowhere(descriptor))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = _over(partial(ResultFile, drops=not prints_result(words)), sys.stdout)
    sys.stderr = _over(MessageFile, sys.stderr)


def prints_result(words: Sequence[str]) -> bool:
    """Whether the result of a command is what it prints, and in no file."""
    verb = tuple(words)
    return bool(_PRINTED & set(words)) or not {verb[:1], verb[:2]} & _IN_FOLDERS


def _nowhere(descriptor: int) -> TextIO:
    """A stream for a closed descriptor, which no other file may get."""
    opened = os.open(os.devnull, os.O_RDWR)
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)
    return open(descriptor, "w" if descriptor else "r", encoding="utf-8", closefd=False)


def _over(kind: Callable[[int, str], MessageFile], stream: TextIO) -> TextIO:
    """A stream with another kind of file; a notebook's or a test's own stream is kept."""
    if type(stream) is not io.TextIOWrapper:
        return stream
    buffer: Any = stream.buffer
    if type(getattr(buffer, "raw", buffer)) is not io.FileIO:  # set up already
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    file = kind(stream.fileno(), stream.encoding)
    return io.TextIOWrapper(
        io.BufferedWriter(file) if hasattr(buffer, "raw") else file,
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def flush_results() -> None:
    """Write what standard output holds back; a reader that has left, such as `head`, is no error.

    Raises:
        OSError: naming standard output, if the results of the command cannot be stored.
    """
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
