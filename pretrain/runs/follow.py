"""Follows ``metrics.jsonl`` of a run that may be training: each look reads only the new lines.

Nothing is locked or written. A line that is still being written waits for the next look, and a line
that is not one of metrics is left out and counted.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.disk import open_regular
from pretrain.runs.metrics import METRICS
from pretrain.runs.records import LINES, Line, check_record

_SMOOTHED = 20
"""Number of logged lines over which the speed is averaged."""
_EVENTS, _MEASURED = 50, 1000
"""Number of events, and of measurements, that are kept, the newest ones."""
_TAIL = 1 << 16
"""Bytes at the end of a long file that are enough for the present state."""
_COMPARED = 200
"""Bytes by which a file that continues is told from another one: more than a line's beginning."""
_BLOCK, _BLOCKS = 1 << 20, 64
"""Bytes in which an earlier line is looked for, and how often at most."""


class Speed:
    """Tokens per second over the last logged lines; measurements and checkpoints do not count."""

    def __init__(self) -> None:
        self._parts: deque[tuple[float, float]] = deque(maxlen=_SMOOTHED)

    def add(self, tokens: float, seconds: float) -> None:
        """Add what was trained since the line before."""
        if seconds > 0 and math.isfinite(tokens):
            self._parts.append((tokens, seconds))

    @property
    def value(self) -> float:
        """Tokens per second; 0 before the first line."""
        seconds = sum(part[1] for part in self._parts)
        return sum(part[0] for part in self._parts) / seconds if seconds else 0.0


@dataclass
class Present:
    """What the metrics of a run say by now."""

    step: int = 0
    """The last update with a line."""
    loss: float | None = None
    """Its training loss; None before the first line, NaN if it was not finite."""
    update: dict[str, Any] = field(default_factory=dict)
    """The last line about an update."""
    ranks: dict[str, Any] = field(default_factory=dict)
    """The last line about a measurement of ranks."""
    measured: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_MEASURED))
    """All lines about measurements that were read, the newest ones."""
    held_out: dict[str, Any] = field(default_factory=dict)
    """The last line about an evaluation."""
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_EVENTS))
    losses: list[tuple[int, float]] = field(default_factory=list)
    """Step and training loss of every line that was read."""
    speed: Speed = field(default_factory=Speed)
    damaged: int = 0
    """Number of lines that are not metrics."""

    def add(self, line: bytes) -> None:
        """Take a whole line of the file."""
        try:
            row = json.loads(line.decode())
            kind = row.get("kind") if isinstance(row, dict) else None
            check_record(row, LINES.get(kind, Line) if isinstance(kind, str) else Line)
        except (ValueError, RecursionError):
            self.damaged += 1
            return
        if kind == "train":
            self._updated(row)
        elif kind == "ranks":
            self.ranks = row
            self.measured.append(row)
        elif kind == "evaluation":
            self.held_out = row
        elif kind == "event":
            self.events.append(row)

    def _updated(self, row: dict[str, Any]) -> None:
        self.update, self.step = row, row["step"]
        self.loss = number(row.get("loss"))
        self.losses.append((self.step, self.loss))
        speed, seconds = number(row.get("tokens_per_second")), number(row.get("seconds", 1.0))
        self.speed.add(speed * seconds, seconds)


def number(value: Any) -> float:
    """A figure of a line; NaN if it is missing or not finite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def in_words(ranks: dict[str, Any]) -> str:
    """``0.669/0.552``: mean pseudo-ranks of W_QK and W_VP; empty before the first measurement."""
    values = [number(ranks.get(f"pseudo_rank_{product}")) for product in ("qk", "vp")]
    return "/".join(f"{value:.3f}" for value in values) if ranks else ""


class Follower:
    """The present state of a run, by its metrics."""

    def __init__(self, run: Path, whole: bool = False) -> None:
        """
        Args:
            whole: read the file from its beginning; otherwise only what the present state needs.
        """
        self._path, self._whole = run / METRICS, whole
        self._inode: int | None = None
        self._offset = 0
        self._last = b""
        """The last bytes before ``_offset``: a run that goes back writes another file, which can
        have the inode of an earlier one."""
        self._rest = b""
        self.present = Present()

    def look(self) -> Present:
        """Read what was added since the last look; a file that cannot be read adds nothing."""
        try:
            with open_regular(self._path) as file:
                self._read(file)
        except OSError:  # not there yet, or being replaced
            pass
        return self.present

    def _read(self, file: BinaryIO) -> None:
        if not self._is_same(file):
            about = os.fstat(file.fileno())
            self._inode, self._offset, self._rest, self._last = about.st_ino, 0, b"", b""
            self.present = Present()
            if not self._whole and about.st_size > _TAIL:
                self._begin_at_tail(file, about.st_size - _TAIL)
        file.seek(self._offset)
        while block := file.read(_BLOCK):
            self._offset += len(block)
            self._last = (self._last + block)[-_COMPARED:]
            *lines, self._rest = (self._rest + block).split(b"\n")
            for line in lines:
                if line.strip():
                    self.present.add(line)

    def _is_same(self, file: BinaryIO) -> bool:
        """Whether the file continues what was read before."""
        if os.fstat(file.fileno()).st_ino != self._inode:
            return False
        file.seek(self._offset - len(self._last))
        return file.read(len(self._last)) == self._last

    def _begin_at_tail(self, file: BinaryIO, start: int) -> None:
        """Take the last measurement and evaluation before a place, and go to the next line."""
        for kind in ("ranks", "evaluation"):
            line = _last_before(file, start, b'\n{"kind": "%s"' % kind.encode())
            if line:
                self.present.add(line)
        file.seek(start)
        self._offset = start + len(file.readline(_BLOCK))


def _last_before(file: BinaryIO, end: int, beginning: bytes) -> bytes:
    """The last whole line before a place that begins so, of the bytes that are looked through."""
    for _ in range(_BLOCKS):
        start = max(0, end - _BLOCK)
        file.seek(start)
        place = file.read(end - start + len(beginning)).rfind(beginning)
        if place >= 0:
            file.seek(start + place + 1)
            return file.readline(_BLOCK)
        if start == 0:
            return b""
        end = start
    return b""
