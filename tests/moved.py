"""First values of gains and biases that are not all 1 or 0, the same on every grid."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from models.initial import Initial
from models.roles import Role


@contextmanager
def moved_constants() -> Iterator[None]:
    """Models built in here have 0.1 times normal numbers added to their gains and biases."""
    plain = Initial.part

    def part(
        initial: Initial, rank: int = 0, size: int = 1, low: int = 0, high: int | None = None
    ) -> torch.Tensor:
        values, info = plain(initial, rank, size, low, high), initial.info
        if info.role in (Role.NORM, Role.BIAS):
            draw = torch.Generator().manual_seed(zlib.crc32(info.name.encode()))
            whole = 0.1 * torch.randn(info.shape, generator=draw)
            local = whole if info.partition_dim is None else whole.chunk(size)[rank]
            values = values + local[low : low + values.numel()]
        return values

    Initial.part = part  # type: ignore[assignment]
    try:
        yield
    finally:
        Initial.part = plain  # type: ignore[method-assign]
