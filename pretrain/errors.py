"""Errors that a user can fix, shown as one line, never as a traceback; and the end by a signal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
TRY_AGAIN = 75
"""Exit code (EX_TEMPFAIL) of a job that stopped because of its machines, not because of its recipe:
rerun the same command."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class Stopped(BaseException):
    """A signal asks the process to end; raised between two instructions of the main thread.

    It is not an `Exception`, which calling code may swallow, and not a `KeyboardInterrupt`, which
    Typer turns into its own exit code.
    """


ENDS = (KeyboardInterrupt, Stopped)
"""What a signal raises. Whatever else a user's code or a service raises is its fault."""


class RunError(RuntimeError):
    """Something in the run, its files or its machine is wrong (exit code 1)."""


class MachineError(RunError):
    """A machine failed; on another one the same command would continue (exit code 75)."""


class UsageError(ValueError):
    """The recipe or the command line is wrong (exit code 2)."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """Call a function; return (its result, "") or (None, one line about what went wrong)."""
    try:
        return action(), ""
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            return None, f"{error.filename or ''}: {error.strerror}".removeprefix(": ")
        return None, first_line(error)
