"""Errors that a user can fix: shown as one line, never as a traceback."""

from __future__ import annotations

TRY_AGAIN = 75
"""Exit code (EX_TEMPFAIL) of a job that stopped because of its machines, not because of its recipe:
rerun the same command."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class RunError(RuntimeError):
    """Something in the run, its files or its machine is wrong (exit code 1)."""


class MachineError(RunError):
    """A machine failed; on another one the same command would continue (exit code 75)."""


class UsageError(ValueError):
    """The recipe or the command line is wrong (exit code 2)."""
