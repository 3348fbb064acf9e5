"""Writes measurements to the table of a run; what the disk refuses waits in memory."""

from __future__ import annotations

from pathlib import Path

from pretrain.config.run import RanksConfig
from pretrain.ranks.probe import Row
from pretrain.ranks.table import RANKS, add_ranks, rewind_ranks


class RankWriter:
    """The measurements of a run on the process that writes them."""

    def __init__(self, run: Path, measured: RanksConfig) -> None:
        """
        Args:
            measured: the definition of the pseudo-rank, which the table records.
        """
        self._run, self._measured = run, measured
        self._waiting: dict[int, list[Row]] = {}

    @property
    def waiting(self) -> int:
        """The number of measurements that are only in memory."""
        return len(self._waiting)

    def add(self, step: int, rows: list[Row]) -> str:
        """Write a measurement, after those that wait; return why it waits, too, or nothing."""
        self._waiting[step] = rows
        return self.write_waiting()

    def write_waiting(self) -> str:
        """Write the measurements that wait, and return why the disk refuses some, or nothing."""
        try:
            for step in list(self._waiting):
                add_ranks(self._run, step, self._waiting[step], self._measured)
                del self._waiting[step]
        except OSError as error:
            return f"{self._run / RANKS}: {error.strerror or error}"
        return ""

    def rewind(self, step: int) -> None:
        """Remove measurements after ``step``, from the disk and from memory."""
        rewind_ranks(self._run, step)
        self._waiting = {at: rows for at, rows in self._waiting.items() if at <= step}
