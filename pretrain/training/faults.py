"""Decides what to do about bad updates: skip them, or go back and leave out their samples.

A loss or gradient that is not finite changes nothing: `Engine.train_step` skips the update on all
processes, because they share the global gradient norm. After several in a row, or after a spike of
the loss if the recipe asks for it, the run goes back to a checkpoint. Decisions depend only on
figures that every process has, so that all decide alike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_pipeline.files import write_aside
from data_pipeline.strict_json import to_json
from pretrain.config.run import FaultsConfig
from pretrain.errors import RunError
from pretrain.runs.records import Step, read_record

SKIPPED = "the update is skipped"
"""The end of the message of a skipped update; the report searches for it."""
JUMPS = "jumps.json"
"""File in a run folder with the blocks of samples that updates leave out."""


class GoBackError(RunError):
    """The run must go back to a checkpoint before ``step``."""

    def __init__(self, step: int, reason: str, jump: tuple[int, ...] = ()) -> None:
        """
        Args:
            step: the first update that must be undone.
            jump: updates whose samples are left out from now on.
        """
        super().__init__(reason)
        self.step, self.jump = step, jump


def block_of(update: int, jumped: Iterable[int]) -> int:
    """Number of the block of samples that an update uses, counted from 0.

    Without jumps, update s uses block s; each jumped block shifts the later ones by one.
    """
    block = update
    for jump in sorted(jumped):
        if jump <= block:
            block += 1
    return block


def read_jumps(run: Path) -> list[int]:
    """Jumped blocks of a run folder."""
    try:
        jumps: list[int] = read_record(run / JUMPS, list[Step])
        return jumps
    except FileNotFoundError:
        return []


def write_jumps(run: Path, jumped: list[int]) -> None:
    """Save jumped blocks, for a start before the next checkpoint."""
    write_aside(run / JUMPS, to_json(jumped).encode())


class FaultDetector:
    """Checks every update's loss and decides which updates must be undone."""

    def __init__(self, config: FaultsConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._row: list[int] = []
        self.skipped = 0
        """Number of updates skipped since the run began."""

    def observe(self, step: int, loss: float, skipped: bool, where: str = "") -> str:
        """Check the loss of update ``step`` (the first is 1).

        Args:
            where: what is known of the place of a value that is not finite, for the message.

        Returns:
            A message about it, or an empty text.

        Raises:
            GoBackError: if the run should go back.
        """
        if skipped:
            self.skipped += 1
            self._row.append(step)
            cause = f"the loss is {loss}" if not math.isfinite(loss) else "a gradient is not finite"
            cause += f" ({where})" if where else ""
            if len(self._row) >= self._config.skip_limit:
                raise GoBackError(
                    self._row[0], f"{cause}, {len(self._row)} updates in a row", tuple(self._row)
                )
            return f"{cause}: {SKIPPED}"
        self._row.clear()
        if self._is_spike(loss):
            raise GoBackError(
                step, f"the loss {loss:.4f} is a spike above {statistics.fmean(self._losses):.4f}",
                (step,),
            )  # fmt: skip
        self._losses.append(loss)
        return ""

    def _is_spike(self, loss: float) -> bool:
        if not self._config.spike or len(self._losses) < self._config.spike_window:
            return False
        spread = statistics.stdev(self._losses)
        return loss > statistics.fmean(self._losses) + self._config.spike * spread

    @property
    def is_skipping(self) -> bool:
        """Whether the last update was skipped."""
        return bool(self._row)

    def state(self) -> dict[str, Any]:
        """The state that a resumed run needs (JSON)."""
        losses = list(self._losses) if self._config.spike else []
        return {"losses": losses, "row": list(self._row), "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        self._losses.clear()
        self._losses.extend(state["losses"])
        self._row = list(state["row"])
        self.skipped = state["skipped"]
