"""The live table of a sweep: redrawn on a terminal, one line per change elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from pretrain.cli.console import clock, console, on_one_line
from pretrain.runs.follow import Present, in_words
from pretrain.sweep.status import Status

LEFT = ("run", "state", "note")
"""Columns of text."""
COLUMNS = ("run", "state", "step", "loss", "rank W_QK/W_VP", "tokens/s", "left", "note")


class Table:
    """Shows the state of every run during a sweep."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._live: Any = None
        self._told: dict[str, str] = {}
        if sys.stderr.isatty():
            from rich.live import Live

            self._live = Live(console=console(stderr=True), refresh_per_second=2)
            self._live.start()

    def show(self, statuses: list[Status]) -> None:
        """Draw the present state."""
        if self._live is not None:
            self._live.update(_rich_table(self._title, statuses))
            return
        for status in statuses:
            if self._told.get(status.task.name, "waiting") != status.state:
                self._told[status.task.name] = status.state
                done = sum(item.state == "done" for item in statuses)
                note = f": {status.note}" if status.note else ""
                print(
                    on_one_line(
                        f"{self._title} {done}/{len(statuses)} done; {status.task.name} "
                        f"{status.state}{note}"
                    ),
                    file=sys.stderr,
                    flush=True,
                )

    def close(self, statuses: list[Status]) -> None:
        """Draw the last state and stop."""
        self.show(statuses)
        if self._live is not None:
            self._live.stop()


def _rich_table(title: str, statuses: list[Status]) -> Any:
    from rich.table import Table as RichTable

    done = sum(status.state == "done" for status in statuses)
    table = RichTable(title=f"{title}: {done} of {len(statuses)} done")
    for column in COLUMNS:
        left = column in LEFT
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    waiting = 0
    for status in statuses:
        if status.state == "waiting" and not status.note:
            waiting += 1
            if waiting > 5:
                continue
        table.add_row(
            status.task.name,
            status.state,
            f"{status.step}/{status.task.last}",
            *figures(status.present, status.state == "running"),
            "" if status.seconds_left is None else clock(status.seconds_left),
            status.note[:60],
        )
    if waiting > 5:
        table.add_row(f"... {waiting - 5} more", "waiting", *[""] * (len(COLUMNS) - 2))
    return table


def figures(present: Present, running: bool) -> list[str]:
    """Loss, mean pseudo-ranks and, of a running run, its speed: the cells of ``COLUMNS``."""
    loss = "" if present.loss is None else f"{present.loss:.3f}"
    speed = f"{present.speed.value:,.0f}" if running and present.speed.value else ""
    return [loss, in_words(present.ranks), speed]
