"""How a command ends: its exit code, one line or a traceback, and the end of the process itself.

There are four kinds of errors. Usage errors (code 2) and trouble with files, disks and memory (1)
are shown as one line, and another start would end the same way. Failures of a machine, a GPU or the
network (75) are also one line, and rerunning the same command continues. Everything else is a bug:
its traceback is shown.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import sys
import traceback
from typing import NoReturn

from pretrain.cli.console import plain
from pretrain.distributed.failures import exit_code, is_stop, one_line
from pretrain.distributed.signals import SIGNALS
from pretrain.errors import TRY_AGAIN

_LONGEST = 900
"""Number of letters of an error that are shown; a value or a path may have thousands."""


def report_stop(end: BaseException) -> int:
    """Report that a signal ended the command, which is no error, and return the exit code.

    Args:
        end: what the signal raised, or became; its note says how to go on.
    """
    what = f"stopped by {SIGNALS.name}" if SIGNALS.code == TRY_AGAIN else "interrupted"
    notes = getattr(end, "__notes__", None) or ["rerun the same command"]
    return _end(f"{what}; {notes[-1]}", SIGNALS.code)


def report_failure(error: Exception) -> int:
    """Report an error, with a traceback if it is a bug, and return the exit code."""
    code = exit_code(error)
    if code is None:
        traceback.print_exception(error)
        return _end("", 1)
    line = _shortened(plain(one_line(error)))
    return _end(line if is_stop(error) else f"error: {line}", code)


def report_broken_pipe(end: SystemExit) -> int:
    """Report a broken pipe, at which Click ends a command without a word.

    Every other end is raised again, and so is that of our output: a reader such as `head` left.
    """
    broken = end.__context__
    if isinstance(broken, BrokenPipeError) and not _reader_left():
        return report_failure(broken)
    raise end


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        watched = select.poll()
        watched.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in watched.poll(0))
    return True


def _end(line: str, code: int) -> int:
    """Print the last line, leave the process group, and return the exit code.

    One of several processes leaves at once: it cannot wait for its peers.
    """
    rank, size = (_number_in(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    # All processes fail together with the same message: one of them prints it. One whose place is
    # wrong (or not a number, -1) fails alone.
    if line and (rank <= 0 or rank >= max(1, size)):
        print(line, file=sys.stderr, flush=True)
    if size > 1:
        _flush()
        os._exit(code)
    # Not imported here: a signal may have cut an import of torch, which would fail now.
    disconnect = getattr(sys.modules.get("pretrain.distributed.grid"), "disconnect", None)
    if disconnect is not None:
        disconnect()
    return code


def _number_in(name: str, default: int) -> int:
    """The number in an environment variable; -1 for what is none."""
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        return -1


def _shortened(text: str) -> str:
    """The beginning and the end of a long text: the key or file, and what to do."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 300]} ... {text[-300:]}"


def leave(code: int) -> NoReturn:
    """End the process: run the libraries' exit functions, flush output, and exit.

    The interpreter's own shutdown is not used: threads of gloo, or of a library, that are inside
    C++ code would make it abort (exit code 134, "terminate called without an active exception").
    """
    SIGNALS.ignore()
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or a pipe whose reader has gone
            stream.flush()
