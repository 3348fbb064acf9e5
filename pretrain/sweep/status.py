"""The state of a run of a sweep."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pretrain.runs.follow import Follower, Present
from pretrain.sweep.config import SweepRun


@dataclass
class Status:
    """The state of a task."""

    task: SweepRun
    state: str = "waiting"
    """waiting, running, elsewhere, done or failed."""
    tries: int = 0
    step: int = 0
    note: str = ""
    started: float | None = None
    first_step: int = 0
    follower: Follower = field(init=False)
    """Reads its metrics."""
    checkpoint: str = ""
    """The newest checkpoint at the beginning of this start."""

    def __post_init__(self) -> None:
        self.follower = Follower(self.task.run)

    def look(self) -> None:
        """Read what the run has logged since the last look."""
        self.step = self.follower.look().step

    @property
    def present(self) -> Present:
        """What the run has logged so far."""
        return self.follower.present

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end, estimated from the speed of this start."""
        done = self.step - self.first_step
        if self.state != "running" or self.started is None or done < 1:
            return None
        return (time.monotonic() - self.started) / done * (self.task.last - self.step)
