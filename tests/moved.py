"""First values of gains and biases that are not all 1 or 0, the same on every grid."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from models.layers import ParameterFactory
from models.roles import ParameterInfo, Role


@contextmanager
def moved_constants() -> Iterator[None]:
    """Models built in here have 0.1 times normal numbers added to their gains and biases."""
    plain = ParameterFactory._stamped

    def stamped(
        factory: ParameterFactory, full: torch.Tensor, info: ParameterInfo, rows: int | None
    ) -> nn.Parameter:
        if info.role in (Role.NORM, Role.BIAS):
            draw = torch.Generator().manual_seed(zlib.crc32(info.name.encode()))
            full = full + 0.1 * torch.randn(full.shape, generator=draw)
        return plain(factory, full, info, rows)

    ParameterFactory._stamped = stamped  # type: ignore[assignment]
    try:
        yield
    finally:
        ParameterFactory._stamped = plain  # type: ignore[method-assign]
