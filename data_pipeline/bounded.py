"""Reads tokens and checks each one: an id outside the vocabulary ends the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.records import DataError


class BoundedReader:
    """Megatron's reader of a ``.bin`` that refuses tokens outside the vocabulary."""

    def __init__(self, reader: Any, data: Path, starts: np.ndarray, size: int) -> None:
        """
        Args:
            starts: first byte of each document.
            size: of the vocabulary.
        """
        self._reader, self._data, self._starts, self._size = reader, data, starts, size

    def read(self, dtype: Any, count: int, offset: int) -> Any:
        """``count`` elements from byte ``offset`` on.

        Raises:
            DataError: naming the document and the id that is not in the vocabulary.
        """
        tokens = self._reader.read(dtype=dtype, count=count, offset=offset)
        if count and (tokens.min() < 0 or tokens.max() >= self._size):
            index = int(np.flatnonzero((tokens < 0) | (tokens >= self._size))[0])
            where = offset + index * np.dtype(dtype).itemsize
            number = int(np.searchsorted(self._starts, where, side="right")) - 1
            raise DataError(
                f"{self._data}: document {number} has token {tokens[index]}, but the vocabulary "
                f"has {self._size} tokens; tokenise again, or set model.vocabulary_size to more "
                "than the largest id"
            )
        return tokens
