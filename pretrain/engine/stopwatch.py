"""Seconds of the parts of an update, without waiting for the device inside it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Sums the seconds of named parts.

    On a GPU the host only orders the work, so events of the device say when a part began and ended.
    They are read in `take`, after the update has waited for its own loss; there is no other wait.
    """

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: where the parts run.
        """
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str, on_host: bool = False) -> Iterator[None]:
        """Count a block as a part.

        Args:
            on_host: the host does the work itself, also if there is a GPU.
        """
        if self._on_gpu and not on_host:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            try:
                yield
            finally:
                end.record()
                self._events.append((name, begin, end))
            return
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call; of what the device has not finished, later."""
        while self._events and self._events[0][2].query():
            name, begin, end = self._events.pop(0)
            self._seconds[name] += begin.elapsed_time(end) / 1000
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
