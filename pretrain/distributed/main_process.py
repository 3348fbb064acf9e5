"""Exchange with the main process, for a thread of each process beside training."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pretrain.distributed.grid import Grid

_PATIENCE = timedelta(days=1)
"""Timeout for a process whose disk or network is slower than the others'; the watchdog sees
whether it works."""
_LAZY = "TORCH_GLOO_LAZY_INIT"
"""PyTorch reads this variable whenever it makes a group of gloo."""


@contextlib.contextmanager
def _connected_on_use() -> Iterator[None]:
    """Groups of gloo that are made here connect the processes that talk, not each with all."""
    before = os.environ.get(_LAZY)
    os.environ[_LAZY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LAZY]
        else:
            os.environ[_LAZY] = before


class MainProcess:
    """Collective calls to and from the main process, in a process group of their own.

    One thread of each process may use it at a time; training can continue meanwhile. The main
    process has a connection to every other one; the others have a few.
    """

    def __init__(self, grid: Grid) -> None:
        """All processes make one together."""
        self.grid = grid
        self._group: Any = None
        if grid.world_size > 1:
            with _connected_on_use():
                self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            self.tell(self.gather(None))  # connect now, while all processes are there

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes on the main one, in rank order, and nothing on the others.

        Entries of a manifest are large on a large grid, and only the main process writes it.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.grid.world_size if self.grid.is_main else []
        dist.gather_object(value, values or None, dst=0, group=self._group)
        return values

    def tell(self, value: Any) -> Any:
        """The main process's value, on every process."""
        values = [value]
        if self._group is not None:
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]
