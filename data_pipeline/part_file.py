"""One file for each part of a tokenisation: the documents of every split and subset in it.

The arrays follow each other, and a list of them ends the file. So a part costs one file and one
wait for the disk, however many subsets it has.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.disk import naming
from data_pipeline.encode import DOCUMENT_TYPE, Encoded, Key
from data_pipeline.records import DataError
from data_pipeline.strict_json import to_json

SUFFIX = ".part"
_END = struct.Struct("<Q8s")
"""Bytes of the list before it, and a word that says that the file is whole."""
_WORD = b"PARTDONE"
_PIECE = 1 << 20


@dataclass(frozen=True)
class Span:
    """Some bytes of a file."""

    path: Path
    start: int
    size: int

    def read(self, dtype: Any) -> np.ndarray:
        """The values."""
        count = self.size // np.dtype(dtype).itemsize
        return np.fromfile(self.path, dtype, count, offset=self.start)

    def pieces(self) -> Iterator[bytes]:
        """The bytes, in pieces of a megabyte."""
        left = self.size
        with self.path.open("rb") as file:
            file.seek(self.start)
            while left and (piece := file.read(min(left, _PIECE))):
                yield piece
                left -= len(piece)


@dataclass(frozen=True)
class PartPiece:
    """Where the documents of one split and subset are."""

    key: Key
    tokens: Span
    lengths: Span
    """``[documents]`` int32, tokens of each."""
    documents: Span
    """``[documents]`` `DOCUMENT_TYPE`."""


def write_part(path: Path, results: dict[Key, Encoded]) -> None:
    """Write a part and wait until it is on disk."""
    entries: list[Any] = []
    with naming(path), path.open("wb") as file:
        for key, encoded in sorted(results.items()):
            sizes = []
            for arrays in (encoded.tokens, encoded.lengths, encoded.documents):
                begin = file.tell()
                for array in arrays:
                    file.write(np.ascontiguousarray(array).data)
                sizes.append(file.tell() - begin)
            entries.append([*key, *sizes])
        listed = to_json(entries).encode()
        file.write(listed + _END.pack(len(listed), _WORD))
        file.flush()
        os.fsync(file.fileno())


def read_part(path: Path) -> list[PartPiece]:
    """The pieces of a part.

    Raises:
        DataError: if the file is not a whole part.
    """
    try:
        with path.open("rb") as file:
            whole = file.seek(0, os.SEEK_END)
            file.seek(max(0, whole - _END.size))
            length, word = _END.unpack(file.read(_END.size))
            if word != _WORD or length > whole - _END.size:
                raise ValueError(word)
            file.seek(whole - _END.size - length)
            entries = json.loads(file.read(length))
        found, start = [], 0
        for split, subset, *sizes in entries:
            spans = []
            for size in sizes:
                spans.append(Span(path, start, size))
                start += size
            found.append(PartPiece((split, subset), *spans))
        if start != whole - _END.size - length:
            raise ValueError(start)
        return found
    except FileNotFoundError:
        problem = "missing"
    except (ValueError, TypeError, struct.error):
        problem = "damaged"
    raise DataError(f"{path}: {problem}; restore it, or delete {path.parent} to start again")


def read_folder(folder: Path, entries: list[Any]) -> list[PartPiece]:
    """The pieces of a part of earlier versions: three files for each split and subset."""
    found = []
    for split, subset, number in entries:
        spans = [
            Span(path, 0, path.stat().st_size)
            for path in (folder / f"{number}{end}" for end in (".bin", ".len", ".doc"))
        ]
        found.append(PartPiece((split, subset), *spans))
    return found


def joined(pieces: list[PartPiece]) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and documents of some pieces of one split and subset."""
    lengths = [piece.lengths.read(np.int32) for piece in pieces]
    documents = [piece.documents.read(DOCUMENT_TYPE) for piece in pieces]
    return np.concatenate(lengths), np.concatenate(documents)
