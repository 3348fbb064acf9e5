"""What a sweep hands to whoever can start processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

MEETING = "RANKDECAY_MEETING"
"""Variable with the folder where the processes of one start meet on one machine."""


@dataclass(frozen=True)
class Job:
    """One run, as words after `pretrain`."""

    name: str
    words: list[str]
    processes: int
    log: Path


class Executor(Protocol):
    """Starts jobs and says how they ended."""

    slots: int
    """Jobs at once; what another process runs in this sweep's folders counts too."""

    def submit(self, jobs: list[Job]) -> None:
        """Start jobs."""

    def poll(self) -> dict[str, int]:
        """Exit codes of the jobs that have ended since the last call."""

    def stop(self) -> None:
        """End everything that is under way, cleanly where possible."""
