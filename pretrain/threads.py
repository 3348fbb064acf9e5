"""Small linear algebra over many heads: a thread a core, as LAPACK gains nothing from more."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def in_threads(work: Callable[..., T], batches: list[Tensor], few: int) -> list[T]:
    """``work`` on ``few`` entries of the batches at a time, in order.

    Args:
        batches: CPU tensors with the same first dimension; on a GPU, which has its own ways to
            share work, everything is done at once.
        few: at least 1 is taken, and no more than leaves work for every thread.
    """
    threads = torch.get_num_threads()
    count = len(batches[0])
    if batches[0].device.type != "cpu":
        return [work(*batches)]
    few = max(1, min(few, -(-count // threads)))
    pieces = list(zip(*(batch.split(few) for batch in batches), strict=True))
    if threads == 1 or len(pieces) < 2:
        return [work(*piece) for piece in pieces]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda piece: work(*piece), pieces))
    finally:
        torch.set_num_threads(threads)  # new threads would begin with what was set last
