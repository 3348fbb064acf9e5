"""The jobs of a sweep, and the interface of executors that start them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

MEETING = "RANKDECAY_MEETING"
"""Environment variable with the folder in which processes on one machine connect."""
CONNECTED = "connected-{}"
"""File of a process rank there, from the moment at which it is connected to all others."""


@dataclass(frozen=True)
class Job:
    """One run, as arguments of `pretrain`."""

    name: str
    words: list[str]
    processes: int
    log: Path


class Executor(Protocol):
    """Starts jobs and reports how they ended."""

    slots: int
    """Number of jobs at once, including those of another process in this sweep's folders."""

    def submit(self, jobs: list[Job]) -> None:
        """Start jobs."""

    def poll(self) -> dict[str, int]:
        """Exit codes of the jobs that have ended since the last call."""

    def stop(self) -> None:
        """End all running jobs, cleanly if possible."""
