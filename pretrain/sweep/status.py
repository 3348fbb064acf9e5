"""The state of a run of a sweep."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pretrain.sweep.config import SweepRun


@dataclass
class Status:
    """The state of a task."""

    task: SweepRun
    state: str = "waiting"
    """waiting, running, elsewhere, done or failed."""
    tries: int = 0
    step: int = 0
    loss: float | None = None
    note: str = ""
    started: float | None = None
    first_step: int = 0
    checkpoint: str = ""
    """The newest checkpoint at the beginning of this start."""

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end, estimated from the speed of this start."""
        done = self.step - self.first_step
        if self.state != "running" or self.started is None or done < 1:
            return None
        return (time.monotonic() - self.started) / done * (self.task.last - self.step)
