"""Standard streams: any text can be written, messages end nothing, and results are whole."""

from __future__ import annotations

import contextlib
import errno
import io
import sys
from typing import Any, TextIO

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ESTALE, errno.EROFS)
"""Errors of a full or lost disk under a log file, and of a terminal that has gone."""


_write_some = io.FileIO.write
"""Writes as many bytes as the disk takes."""


class _StreamFile(io.FileIO):
    """The file of a stream, which writes all bytes or fails, with and without a buffer above it."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)

    def write(self, data: Any) -> int:
        """Write all bytes; a disk that fills takes some first, and then fails."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            left = left[_write_some(self, left) or 0 :]
        return size


class MessageFile(_StreamFile):
    """The file of standard error; it drops messages that the disk or the terminal refuses.

    A batch system puts standard error into a file, often on the disk of the run. If this disk is
    full, the work goes on. The first message after that says how much is missing.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self._dropped = 0

    def write(self, data: Any) -> int:
        """Write bytes; the count of those that were written or dropped."""
        try:
            if self._dropped:
                notice = f"\nwarning: {self._dropped} bytes of messages could not be written here\n"
                super().write(notice.encode())
                self._dropped = 0
            return super().write(data)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self._dropped += len(data)
            return len(data)


class ResultFile(_StreamFile):
    """The file of standard output, whose errors name it."""

    def write(self, data: Any) -> int:
        """Write bytes; the count of those that were written."""
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from None


def set_up_streams() -> None:
    """Let the standard streams of a command write any text, and name or drop what is refused.

    Characters that the encoding lacks are written as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = _over(ResultFile, sys.stdout)
    sys.stderr = _over(MessageFile, sys.stderr)


def _over(kind: type[MessageFile | ResultFile], stream: TextIO) -> TextIO:
    """A stream with another class of file; a notebook's or a test's own stream is kept."""
    if type(stream) is not io.TextIOWrapper:
        return stream
    buffer: Any = stream.buffer
    if type(getattr(buffer, "raw", buffer)) is not io.FileIO:  # set up already
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    file = kind(stream.fileno())
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
    if sys.stdout is not None:  # closed by the caller
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
