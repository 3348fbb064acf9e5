"""How a command ends: its exit code, one line or a traceback, and the end of the process itself.

An error is of one of four kinds. A mistake of usage (code 2) and trouble with files, disks and
memory (1) are one line, and another start would end the same. What a machine, a GPU or the network
did (75) is one line too, and the same words go on. All else is a bug: its traceback is shown.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import traceback
from typing import NoReturn

from pretrain.console import plain
from pretrain.distributed.failures import exit_code, one_line
from pretrain.distributed.signals import SIGNALS
from pretrain.errors import TRY_AGAIN


def stopped() -> str:
    """What is said when a signal ended a command."""
    if SIGNALS.code == TRY_AGAIN:
        return f"stopped by {SIGNALS.name}; the same words start it again"
    return "interrupted; the same words go on from the last checkpoint"


def report_failure(error: Exception) -> int:
    """Say what went wrong, with a traceback where it is a bug; returns the exit code."""
    code = exit_code(error)
    if code is not None:
        return fail(one_line(error), code)
    traceback.print_exception(error)
    return fail("", 1)


def fail(text: str, code: int) -> int:
    """Say what is wrong and let go of the process group; returns the exit code.

    A process of several leaves at once: its peers cannot be waited for.
    """
    # Ranks fail together with the same words: one of them says so.
    if text and os.environ.get("RANK", "0") == "0":
        print(f"error: {plain(text)}", file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _flush()
        os._exit(code)
    # Not imported here: a signal may have cut an import of torch, which would fail now.
    disconnect = getattr(sys.modules.get("pretrain.distributed.grid"), "disconnect", None)
    if disconnect is not None:
        disconnect()
    return code


def leave(code: int) -> NoReturn:
    """End the process: run what libraries want at the end, flush, and go.

    Not by the interpreter's own end: threads of gloo, or of a library, that are inside C++ then
    would make it abort (exit code 134, "terminate called without an active exception").
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
