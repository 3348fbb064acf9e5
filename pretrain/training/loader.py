"""Loads the batches of a data-parallel rank for each step, read ahead in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader

from data_pipeline.children import leave_signals_to_parent, signals_held_back
from pretrain.distributed.grid import Grid
from pretrain.engine.passes import Batch
from pretrain.tasks.task import Samples
from pretrain.training.faults import block_of

_GRACE = 3600.0
"""Seconds that a worker lives on after a SIGTERM, in which the run writes its last checkpoint."""


def sample_numbers(block: int, global_batch: int, grid: Grid, micro: int) -> list[list[int]]:
    """Samples of this data-parallel rank in a block, one list per micro batch.

    Block s has samples s·B … (s+1)·B − 1 of the order that the seed determines, on every grid.
    Update s uses block s, unless the run left out some blocks after faults (`block_of` in
    `pretrain.training.faults`).
    """
    share = global_batch // grid.data
    first = block * global_batch + grid.data_rank * share
    return [list(range(start, start + micro)) for start in range(first, first + share, micro)]


class Loader:
    """Endless micro batches from ``first_step`` on."""

    def __init__(
        self,
        data: Samples,
        grid: Grid,
        global_batch: int,
        micro: int,
        first_step: int,
        prefetch: int,
        workers: int = 0,
        jumped: tuple[int, ...] = (),
    ) -> None:
        """
        Args:
            jumped: blocks of samples that are left out.
            prefetch: micro batches that a thread reads ahead; 0: none.
            workers: processes that read instead, for samples that take work to make.
        """
        self._data, self._grid, self._micro = data, grid, micro
        self._global_batch, self._step = global_batch, first_step
        self._prefetch, self._jumped = prefetch, jumped
        self._pool = ThreadPoolExecutor(1) if prefetch and not workers else None
        self._read_by_workers: Iterator[Batch] | None = None
        if workers:
            # A worker makes a sample from its number, so the number of workers changes nothing.
            loader: DataLoader[Batch] = DataLoader(
                data,  # type: ignore[arg-type]
                batch_sampler=self._order(),
                num_workers=workers,
                collate_fn=_stack,
                multiprocessing_context="forkserver",
                pin_memory=grid.device.type == "cuda",
                worker_init_fn=_start_worker,
            )
            with signals_held_back(workers=True):  # from the workers and from their fork server
                self._read_by_workers = iter(loader)
        self._waiting: deque[Future[Batch]] = deque()
        self._numbers = self._order()

    def _order(self) -> Iterator[list[int]]:
        step = self._step
        while ((block := block_of(step, self._jumped)) + 1) * self._global_batch <= len(self._data):
            yield from sample_numbers(block, self._global_batch, self._grid, self._micro)
            step += 1

    def _read(self, numbers: list[int]) -> Batch:
        inputs, labels = _stack([self._data[number] for number in numbers])
        if self._grid.device.type == "cuda":
            inputs, labels = inputs.pin_memory(), labels.pin_memory()
        return inputs, labels

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._read_by_workers is not None:
            inputs, labels = next(self._read_by_workers)
        elif self._pool is None:
            inputs, labels = self._read(next(self._numbers))
        else:
            while len(self._waiting) <= self._prefetch:
                numbers = next(self._numbers, None)
                if numbers is None:
                    break
                self._waiting.append(self._pool.submit(self._read, numbers))
            if not self._waiting:
                raise StopIteration
            inputs, labels = self._waiting.popleft().result()
        device = self._grid.device
        return inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def close(self) -> None:
        """Stop the thread and the workers."""
        self._read_by_workers = None  # the last reference: its end waits for the workers' ends
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(_: int) -> None:
    """Let a worker live until this process ends it, which may first write a checkpoint."""
    leave_signals_to_parent(_GRACE)


def _stack(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    inputs, labels = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
    return inputs, labels
