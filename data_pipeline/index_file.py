"""Megatron's ``.idx``: where each document begins in the ``.bin`` beside it.

Written here, though Megatron has a writer, since loading that takes longer than tokenising 50 MB;
it is read by Megatron's own classes (`data_pipeline.dataset`).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = 34
"""Bytes before the arrays: magic, version, type, and the counts of sequences and documents."""
_VERSION = 1
_CODES = {"int32": 4, "uint16": 8}


def index_size(sequences: int, documents: int) -> int:
    """Bytes of an index file."""
    return HEADER + sequences * 12 + documents * 8


def write_index(path: Path, lengths: np.ndarray, dtype: Any) -> None:
    """Write the index of documents that lie one after the other, each a sequence.

    Args:
        lengths: ``[documents]`` tokens of each.
        dtype: of the tokens, uint16 or int32.
    """
    kind = np.dtype(dtype)
    counts = lengths.astype("<i4")
    ends = np.cumsum(counts, dtype="<i8") * kind.itemsize
    starts = np.concatenate([np.zeros(1, dtype="<i8"), ends[:-1]])
    bounds = np.arange(len(counts) + 1, dtype="<i8")
    with path.open("wb") as file:
        file.write(MAGIC)
        file.write(struct.pack("<QBQQ", _VERSION, _CODES[kind.name], len(counts), len(bounds)))
        for part in (counts, starts, bounds):
            file.write(part.tobytes())
