"""What the host asks of a GPU beside its main queue of work: figures, and reading weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def to_host(figures: torch.Tensor) -> Callable[[], list[float]]:
    """Begin to copy a vector of a few numbers; return a function that waits for them.

    What the device is given after this call delays them no more.
    """
    if figures.device.type != "cuda":
        return figures.tolist
    place = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    place.copy_(figures, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[float]:
        arrived.synchronize()
        return list(place.tolist())

    return wait


class Beside:
    """A second queue of work for a GPU, for what only reads the weights of the last update.

    Without it, that work would wait for the passes of the next update, which are queued already.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = None
        self._made: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1)

    def weights_are_made(self) -> None:
        """Mark the place in the main queue after which the weights are those of the update."""
        if self._stream is not None:
            self._made = torch.cuda.Event()
            self._made.record()

    @contextmanager
    def __call__(self, wait: bool = True) -> Iterator[None]:
        """Give the work of a block to the second queue.

        Args:
            wait: for its results. If not, only what the main queue gets from here on waits, so
                that it does not change what the block reads.
        """
        if self._made is None:
            yield
            return
        self._stream.wait_event(self._made)
        with torch.cuda.stream(self._stream):
            yield
        if wait:
            self._stream.synchronize()
        else:
            torch.cuda.current_stream().wait_stream(self._stream)

    def wait(self) -> None:
        """Wait for the second queue."""
        if self._stream is not None:
            self._stream.synchronize()
