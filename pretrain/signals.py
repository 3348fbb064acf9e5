"""A scheduler's wish to stop: SIGTERM or its warning signal becomes one checkpoint and an exit."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from pretrain.errors import RunError
from pretrain.grid import Grid

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequestedError(RunError):
    """The run stopped because it was asked to; the same words go on with it."""


class StopSignals:
    """Remembers that a signal came, until every rank can act on it together."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        try:
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread: whoever called decides about signals
            self._before.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._name = signal.Signals(number).name

    @property
    def name(self) -> str:
        """The signal that came here, or what is said where it came to another rank."""
        return self._name or "a signal"

    def agreed(self, grid: Grid) -> bool:
        """Whether any rank was asked to stop; collective."""
        if grid.world_size == 1:
            return self._name is not None
        asked = torch.tensor(int(self._name is not None), device=grid.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())
