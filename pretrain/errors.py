"""Errors that a user can mend: shown as one line, never as a traceback."""

from __future__ import annotations


class RunError(RuntimeError):
    """Something in the run, its files or its machine is wrong (exit code 1)."""


class UsageError(ValueError):
    """The recipe or the command line is wrong (exit code 2)."""
