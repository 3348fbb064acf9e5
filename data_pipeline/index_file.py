"""Megatron's ``.idx`` file: where each document begins in the ``.bin`` beside it.

This module writes it, because importing Megatron's writer takes longer than tokenising 50 MB.
Samples are read by Megatron's own classes (`data_pipeline.indexed`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.disk import naming

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, type, and the counts of sequences and documents."""
TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""Integer types of tokens, by Megatron's type code."""


@dataclass(frozen=True)
class Header:
    """The header of an index."""

    code: int
    """Type code of the tokens, in `TYPES` if they are integers."""
    sequences: int
    documents: int
    """Number of document bounds, one more than documents."""

    @property
    def file_size(self) -> int:
        """Bytes of the whole index."""
        return _HEADER.size + self.sequences * 12 + self.documents * 8


def read_header(file: BinaryIO) -> Header | None:
    """The header of an index, or None if it is not an index; the lengths follow, int32."""
    head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        return None
    magic, _, *values = _HEADER.unpack(head)
    return Header(*values) if magic == _MAGIC else None


def write_index(path: Path, lengths: np.ndarray, dtype: Any) -> None:
    """Write the index of consecutive documents of one sequence each.

    Args:
        lengths: ``[documents]`` tokens of each.
        dtype: of the tokens, uint16 or int32.
    """
    kind = np.dtype(dtype)
    code = next(code for code, name in TYPES.items() if name == kind.name)
    counts = lengths.astype("<i4")
    ends = np.cumsum(counts, dtype="<i8") * kind.itemsize
    starts = np.concatenate([np.zeros(1, dtype="<i8"), ends[:-1]])
    bounds = np.arange(len(counts) + 1, dtype="<i8")
    with naming(path), path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, code, len(counts), len(bounds)))
        for part in (counts, starts, bounds):
            file.write(part.tobytes())
