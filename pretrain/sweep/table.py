"""The live table of a sweep: redrawn on a terminal, one line per change elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from pretrain.cli.console import clock, console, on_one_line
from pretrain.sweep.status import Status


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
    for column in ("run", "state", "step", "loss", "left", ""):
        table.add_column(column, justify="left" if column in ("run", "state", "") else "right")
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
            f"{status.loss:.3f}" if status.loss is not None else "",
            "" if status.seconds_left is None else clock(status.seconds_left),
            status.note[:60],
        )
    if waiting > 5:
        table.add_row(f"... {waiting - 5} more", "waiting", "", "", "", "")
    return table
