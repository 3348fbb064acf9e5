"""Initial values, which depend on (seed, name, position) alone.

A matrix is drawn in tiles, each from a generator of its own. So a process draws just the part that
it owns, in any order, and the parts of all processes together are one matrix on every grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.roles import ParameterInfo

SCHEME = 2
"""Version of the rule by which values follow from a seed; a run's hash of its initial weights
contains it. Version 1 drew each matrix whole, from one generator."""
TILE = (16, 512)
"""Rows and columns that one generator draws, part of the rule: narrow enough for the shards of
tensor parallelism, and wide enough that drawing takes longer than seeding."""
_BLOCK = 1 << 21
"""Number of elements that are made at a time, about."""


@dataclass(frozen=True)
class Box:
    """Some rows and columns of a global matrix, and the part of them that is wanted."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    low: int
    """First wanted element, in the flattened box."""
    high: int
    place: int
    """Where the wanted elements begin in the flat result."""


def boxes(info: ParameterInfo, rank: int, size: int, low: int, high: int) -> Iterator[Box]:
    """Divide a range of a flattened tensor-parallel shard into boxes of the global matrix.

    The boxes begin at multiples of a tile's rows and are small, so that little memory is needed.
    A vector is a matrix with one column.

    Args:
        rank, size: of tensor parallelism.
        low, high: the range; elements of the shard of ``rank``, flattened.
    """
    rows, columns = matrix_shape(info.shape)
    first, left = 0, 0
    if info.partition_dim == 0:
        rows //= size
        first = rank * rows
    elif info.partition_dim == 1:
        columns //= size
        left = rank * columns
    height = max(1, _BLOCK // (TILE[0] * max(columns, 1))) * TILE[0]
    row, end = low // columns, -(-high // columns)
    while row < end:
        # In global rows, where the tiles are.
        until = min(((first + row) // height + 1) * height - first, end)
        begin, stop = row * columns, until * columns
        yield Box(
            (first + row, first + until),
            (left, left + columns),
            max(low, begin) - begin,
            min(high, stop) - begin,
            max(low, begin) - low,
        )
        row = until


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor's matrix: (n, 1) for a vector."""
    if len(shape) > 2:
        raise ValueError(f"a parameter of shape {shape} is neither a matrix nor a vector")
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)


@dataclass(frozen=True)
class Initial:
    """How the values of one parameter are made.

    Args:
        rows: number of leading rows that have values; those below, the padding of a vocabulary, are
            zero, so that values do not depend on how much padding the grid needs.
        std: standard deviation of Gaussian values; None for a constant.
        value: the constant.
    """

    seed: int
    info: ParameterInfo
    rows: int
    std: float | None
    value: float = 0.0

    @property
    def fingerprint(self) -> str:
        """A hash that is equal for two parameters whose initial values are."""
        shape = (self.rows, *self.info.shape[1:])
        drawn = (SCHEME, self.seed, self.info.name, self.std) if self.std is not None else ()
        return hashlib.sha256(repr((shape, drawn, self.value)).encode()).hexdigest()

    def part(self, rank: int = 0, size: int = 1, low: int = 0, high: int | None = None) -> Tensor:
        """The values of a range of a tensor-parallel shard.

        Args:
            rank, size: of tensor parallelism.
            low, high: the range; elements of the flattened shard. Default: all of it.

        Returns:
            1-D float32 on the CPU.
        """
        shards = 1 if self.info.partition_dim is None else size
        high = self.info.numel // shards if high is None else high
        values = torch.empty(high - low)
        for box in boxes(self.info, rank, size, low, high):
            flat = self._box(box).reshape(-1)[box.low : box.high]
            values[box.place : box.place + flat.numel()] = flat
        return values

    def _box(self, box: Box) -> Tensor:
        (top, bottom), (left, right) = box.rows, box.columns
        made = torch.zeros(bottom - top, right - left)
        filled = max(0, min(bottom, self.rows) - top)
        if self.std is None:
            made[:filled] = self.value
            return made
        height, width = TILE
        for row in range(top // height * height, top + filled, height):
            for column in range(left // width * width, right, width):
                tile = self._tile(row // height, column // width)
                above, before = max(top, row), max(left, column)
                below, after = min(top + filled, row + height), min(right, column + width)
                made[above - top : below - top, before - left : after - left] = tile[
                    above - row : below - row, before - column : after - column
                ]
        return made

    def _tile(self, row: int, column: int) -> Tensor:
        """A tile of Gaussian values; at the last columns of a matrix it is as wide as they are."""
        assert self.std is not None
        _, columns = matrix_shape(self.info.shape)
        width = min(TILE[1], columns - column * TILE[1])
        words = f"{SCHEME}/{self.seed}/{self.info.name}/{row}/{column}"
        digest = hashlib.sha256(words.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.empty(TILE[0], width).normal_(std=self.std, generator=generator)


def declare(parameter: nn.Parameter, initial: Initial) -> nn.Parameter:
    """Attach a parameter's identity (for `models.roles.info_of`) and its initial values; return
    it."""
    parameter.info = initial.info  # type: ignore[attr-defined]
    parameter.initial = initial  # type: ignore[attr-defined]
    return parameter


def initial_of(parameter: Tensor) -> Initial:
    """The initial values that `declare` attached."""
    initial = parameter.initial  # type: ignore[attr-defined]
    assert isinstance(initial, Initial)
    return initial
