"""The live table of a sweep: redrawn on a terminal, one line per change elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pretrain.cli.console import clock, console, on_one_line
from pretrain.runs.follow import Present, in_words
from pretrain.sweep.status import Status

if TYPE_CHECKING:
    from rich.console import Group

_LEFT = ("run", "state")
"""Columns of text in the table; notes stand below it."""
COLUMNS = ("run", "state", "step", "loss", "rank QK/VP", "tokens/s", "left", "note")
_ALWAYS = 5
"""Number of columns that are shown also where they are empty."""


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


def _rich_table(title: str, statuses: list[Status]) -> Group:
    done = sum(status.state == "done" for status in statuses)
    rows: list[list[str]] = []
    waiting = 0
    for status in statuses:
        if status.state == "waiting" and not status.note:
            waiting += 1
            if waiting > 5:
                continue
        rows.append(
            [
                status.task.name,
                status.state,
                f"{status.step}/{status.task.last}",
                *figures(status.present, status.state == "running"),
                "" if status.seconds_left is None else clock(status.seconds_left),
                status.note,
            ]
        )
    if waiting > 5:
        rows.append([f"... {waiting - 5} more", "waiting", *[""] * (len(COLUMNS) - 2)])
    return table_of(f"{title}: {done} of {len(statuses)} done", rows)


def table_of(title: str, rows: Sequence[Sequence[str]]) -> Group:
    """The table of runs without empty columns, and their notes below it.

    A narrow terminal has room for names and figures then.

    Args:
        rows: cells of ``COLUMNS``.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    *cells, note = range(len(COLUMNS))
    shown = [index for index in cells if index < _ALWAYS or any(row[index] for row in rows)]
    for index in shown:
        left = COLUMNS[index] in _LEFT
        table.add_column(
            COLUMNS[index],
            justify="left" if left else "right",
            overflow="fold",
            no_wrap=index > 0,
        )
    for row in rows:
        table.add_row(*(row[index] for index in shown))
    notes = [Text(on_one_line(f"{row[0]}: {row[note]}")) for row in rows if row[note]]
    return Group(Text(on_one_line(title), "italic"), table, *notes)


def figures(present: Present, running: bool) -> list[str]:
    """Loss, mean pseudo-ranks and, of a running run, its speed: the cells of ``COLUMNS``."""
    loss = "" if present.loss is None else f"{present.loss:.3f}"
    speed = f"{present.speed.value:,.0f}" if running and present.speed.value else ""
    return [loss, in_words(present.ranks), speed]
