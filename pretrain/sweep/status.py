"""What is known of a run of a sweep."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pretrain.sweep.config import Task


@dataclass
class Status:
    """What is known of a task."""

    task: Task
    state: str = "waiting"
    """waiting, running, elsewhere, done or failed."""
    tries: int = 0
    step: int = 0
    loss: float | None = None
    note: str = ""
    started: float | None = None
    first_step: int = 0
    checkpoint: str = ""
    """The newest one when this start began."""

    @property
    def left(self) -> float | None:
        """Seconds to the end, from this start's own speed."""
        done = self.step - self.first_step
        if self.state != "running" or self.started is None or done < 1:
            return None
        return (time.monotonic() - self.started) / done * (self.task.last - self.step)
