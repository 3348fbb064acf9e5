"""Updates that go wrong: skipped, or undone by going back to a checkpoint and past their samples.

A loss or gradient that is not finite changes nothing (`Engine.train_step` skips the update, on all
ranks, as the global gradient norm is theirs together). Several in a row, or a spike of the loss
where the recipe asks for it, mean that the run goes back. What is decided here depends on figures
that every rank has, so that all decide alike.
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
"""How the message of a skipped update ends; the report looks for it."""
JUMPS = "jumps.json"
"""File of a run folder: blocks of samples that no update takes any more."""


class GoBackError(RunError):
    """The run must go back to a checkpoint before ``step``."""

    def __init__(self, step: int, reason: str, jump: tuple[int, ...] = ()) -> None:
        """
        Args:
            step: the first update that must not stay.
            jump: updates whose samples are left out from now on.
        """
        super().__init__(reason)
        self.step, self.jump = step, jump


def block_of(update: int, jumped: Iterable[int]) -> int:
    """Number of the block of samples that an update takes, the first being 0.

    Without jumps update s takes block s; each jumped block moves the later ones up by one.
    """
    block = update
    for other in sorted(jumped):
        if other <= block:
            block += 1
    return block


def read_jumps(run: Path) -> list[int]:
    """Jumped blocks of a run folder."""
    try:
        found: list[int] = read_record(run / JUMPS, list[Step])
        return found
    except FileNotFoundError:
        return []


def write_jumps(run: Path, jumped: list[int]) -> None:
    """Remember jumped blocks, for a start before the next checkpoint."""
    write_aside(run / JUMPS, to_json(jumped).encode())


class Judge:
    """Looks at every update's loss and says which must not stay."""

    def __init__(self, config: FaultsConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._row: list[int] = []
        self.skipped = 0
        """Updates skipped since the run began."""

    def observe(self, step: int, loss: float, skipped: bool) -> str:
        """Take the loss of update ``step`` (the first is 1).

        Returns:
            What to tell of it, or nothing.

        Raises:
            GoBackError: if the run should go back.
        """
        if skipped:
            self.skipped += 1
            self._row.append(step)
            what = f"the loss is {loss}" if not math.isfinite(loss) else "a gradient is not finite"
            if len(self._row) >= self._config.skip_limit:
                raise GoBackError(
                    self._row[0], f"{what}, {len(self._row)} updates in a row", tuple(self._row)
                )
            return f"{what}: {SKIPPED}"
        self._row.clear()
        if self._is_spike(loss):
            raise GoBackError(
                step, f"the loss {loss:.4f} is a spike over {statistics.fmean(self._losses):.4f}",
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
        """What a resumed run must know (JSON)."""
        losses = list(self._losses) if self._config.spike else []
        return {"losses": losses, "row": list(self._row), "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self._losses.clear()
        self._losses.extend(state["losses"])
        self._row = list(state["row"])
        self.skipped = state["skipped"]
