"""The passes of an update's micro batches, the first of which may begin before the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.loss import Projection
from pretrain.engine.flat_update import FlatUpdate
from pretrain.engine.recorded import RecordedPasses
from pretrain.engine.stopwatch import Stopwatch

Batch = tuple[Tensor, Tensor]
"""Inputs and labels, each ``[micro batch, context]`` int64."""
Loss = Callable[[Projection, Tensor], Tensor]
"""A function of the model's output and labels: the mean loss of a micro batch, in nats per
token."""


@dataclass(frozen=True)
class _MicroBatch:
    """A micro batch whose gradient is added, or will be by operations that the device has got."""

    source: Iterator[Batch]
    batch: Batch
    loss: Tensor


class Passes:
    """Forward and backward passes of micro batches, on the engine of an update.

    Args:
        updater: DeepSpeed's engine, or the `FlatUpdate` with the same calls.
        loss: the loss of a micro batch.
        count: micro batches of an update.
        recorded: replay passes as CUDA graphs (`pretrain.engine.recorded`); on a `FlatUpdate`.
        alone: no other process makes the same update.
    """

    def __init__(
        self,
        updater: Any,
        loss: Loss,
        count: int,
        stopwatch: Stopwatch,
        recorded: bool,
        alone: bool,
    ) -> None:
        self._updater, self._loss, self._count = updater, loss, count
        self._stopwatch, self._alone = stopwatch, alone
        self._run: Callable[[Tensor, Tensor], Tensor] = self._forward_backward
        if recorded:
            self._run = RecordedPasses(updater, self._forward_backward)
        self._ahead: _MicroBatch | None = None
        self._failure: tuple[Iterator[Batch], Exception] | None = None
        self.last: list[Batch] = []
        """Micro batches of the last update."""

    def update(self, batches: Iterator[Batch]) -> Tensor:
        """Make an update.

        Returns:
            The mean loss over this process's micro batches, on the device.
        """
        total: Tensor | None = None
        ahead = self._taken(batches)
        if ahead is None and isinstance(self._updater, FlatUpdate):
            self._updater.begin()
        self.last.clear()
        for _ in range(self._count):
            made, ahead = ahead or self._micro_batch(batches, self._next(batches)), None
            self.last.append(made.batch)
            with self._stopwatch.part("update"):
                self._updater.step()
            total = made.loss.clone() if total is None else total.add_(made.loss)
        assert total is not None
        return total if self._count == 1 else total.div_(self._count)

    def begin_next(self, batches: Iterator[Batch]) -> None:
        """Give the device the first micro batch of the next update, if there is one.

        Between updates only a restored checkpoint changes weights: `forget_next` comes before it.
        """
        try:
            batch = self._next(batches)
        except StopIteration:
            return
        except Exception as error:
            if not self._alone:  # the others have begun, and would wait for this process's passes
                raise
            self._failure = batches, error  # of the next update: this one may be saved first
            return
        self._updater.begin()
        self._ahead = self._micro_batch(batches, batch)

    @property
    def has_begun_next(self) -> bool:
        """Whether the device computes a part of the next update."""
        return self._ahead is not None

    def forget_next(self) -> None:
        """Drop what was begun of the next update."""
        self._ahead = self._failure = None

    def _taken(self, batches: Iterator[Batch]) -> _MicroBatch | None:
        """What was begun, if it was read from ``batches``."""
        ahead, failure = self._ahead, self._failure
        self.forget_next()
        if failure is not None and failure[0] is batches:
            raise failure[1]
        return ahead if ahead is not None and ahead.source is batches else None

    def _next(self, batches: Iterator[Batch]) -> Batch:
        with self._stopwatch.part("data", on_host=True):
            return next(batches)

    def _micro_batch(self, source: Iterator[Batch], batch: Batch) -> _MicroBatch:
        with self._stopwatch.part("forward_backward"):
            return _MicroBatch(source, batch, self._run(*batch))

    def _forward_backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Add the gradient of a micro batch, and return its loss."""
        loss: Tensor = self._updater(inputs, lambda output: self._loss(output, labels))
        self._updater.backward(loss)
        return loss.detach()
