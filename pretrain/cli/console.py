"""Prints to a terminal: text is shown literally, never as markup or terminal commands."""

from __future__ import annotations

import contextlib
import sys
import time
import unicodedata
from typing import Any

_BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that make a reader see other text than there is."""


def plain(text: str) -> str:
    """The text, with characters that are not plain text as visible escapes.

    Escaped are control characters (which a terminal obeys), bytes of a file name that are not
    UTF-8, and characters that change the direction of reading.
    """
    if text.isprintable():
        return text
    return "".join(_shown(letter) for letter in text)


def _shown(letter: str) -> str:
    is_text = letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cs")
    if is_text and letter not in _BIDIRECTIONAL:
        return letter
    return letter.encode("unicode_escape").decode("ascii")


def on_one_line(text: str) -> str:
    """`plain` text on one line."""
    return plain(" ".join(text.split()))


def console(**settings: Any) -> Any:
    """A rich console that prints text literally: no markup, no emoji codes, no escapes."""
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(plain(text), **options)

    return Plain(markup=False, emoji=False, highlight=False, **settings)


def show_table(table: Any, width: int) -> None:
    """Print a rich table to standard output: as wide as the terminal, or ``width`` elsewhere."""
    console(width=None if sys.stdout.isatty() else width).print(table)


def warn(text: str) -> None:
    """Print a warning line to standard error; a loop that is not ours must not end for it."""
    with contextlib.suppress(OSError):
        print(f"warning: {on_one_line(text)}", file=sys.stderr, flush=True)


class Progress:
    """A progress bar on a terminal, a line every few seconds elsewhere; silent if not active."""

    def __init__(self, total: int, label: str, active: bool, start: int = 0) -> None:
        self._total, self._active, self._label = total, active, on_one_line(label)
        self._start, self._began, self._shown = start, time.monotonic(), 0.0
        self._bar: Any = None
        if active and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeRemainingColumn(),
                console=console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=total, completed=start, note="")

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Show that ``done`` of the total is done."""
        if total is not None and total != self._total:
            self._total = total
            if self._bar is not None:
                self._bar.update(self._task, total=total)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if not self._active or (done < self._total and now - self._shown < 5.0):
            return
        self._shown = now
        speed = (done - self._start) / max(1e-9, now - self._began)
        remaining = (self._total - done) / speed if speed > 0 else 0.0
        text = f"{self._label} {done}/{self._total} {note} {clock(remaining)} left"
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
