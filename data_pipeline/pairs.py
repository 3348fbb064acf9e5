"""Checks a ``.bin/.idx`` pair of Megatron-LM or GPT-NeoX: its index and every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipeline.checksums import Checksums
from data_pipeline.index_file import TYPES, Header, read_header
from data_pipeline.records import ChoiceError, DataError
from data_pipeline.tokenizer import Tokenizer

_CHUNK = 4 << 20
"""Number of bytes of tokens in memory at a time."""


@dataclass(frozen=True)
class Pair:
    """A pair and the contents of its index."""

    prefix: Path
    dtype: str
    lengths: np.ndarray
    """Tokens of each sequence."""
    bounds: np.ndarray
    """Sequences before each document, and their number at the end."""

    @cached_property
    def tokens(self) -> int:
        """Number of tokens in the whole file."""
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def packed(self) -> int:
        """Tokens of every sequence, if all have the same number; else 0."""
        first = int(self.lengths[0])
        return first if len(self.lengths) > 1 and bool((self.lengths == first).all()) else 0

    def path(self, ending: str) -> Path:
        """A file of the pair, such as ``.bin``."""
        return self.prefix.with_name(self.prefix.name + ending)


def read_pair(prefix: Path) -> Pair:
    """Read an index and check that all its parts agree with each other and with the ``.bin``.

    Raises:
        DataError: naming the file and what does not agree.
    """
    index, data = (prefix.with_name(prefix.name + end) for end in (".idx", ".bin"))
    for file in (index, data):
        if not file.is_file():
            raise ChoiceError(
                f"{file}: missing; give the common PREFIX of PREFIX.bin and PREFIX.idx"
            )
    with index.open("rb") as stream:
        header = read_header(stream)
        if header is None:
            raise DataError(f"{index}: not an index of Megatron-LM or GPT-NeoX")
        _check_size(index, header)  # before memory is allocated for the claimed sizes
        lengths = np.fromfile(stream, dtype="<i4", count=header.sequences)
        starts = np.fromfile(stream, dtype="<i8", count=header.sequences)
        bounds = np.fromfile(stream, dtype="<i8", count=header.documents)
    if header.code not in TYPES:
        raise DataError(f"{index}: tokens have type {header.code}; only integers can be used")
    pair = Pair(prefix, TYPES[header.code], lengths, bounds)
    width = np.dtype(pair.dtype).itemsize
    if lengths.min() < 0:
        number = int(np.flatnonzero(lengths < 0)[0])
        raise DataError(f"{index}: sequence {number} has {lengths[number]} tokens")
    wanted = pair.tokens * width
    if data.stat().st_size != wanted:
        raise DataError(f"{data}: has {data.stat().st_size} bytes, but its index says {wanted}")
    ends = np.cumsum(lengths, dtype=np.int64) * width
    wrong = np.flatnonzero(starts != ends - lengths.astype(np.int64) * width)
    if len(wrong):
        raise DataError(
            f"{index}: sequence {wrong[0]} begins at byte {starts[wrong[0]]}, not at the end of "
            "the previous one; the index is damaged"
        )
    whole = len(bounds) > 1 and bounds[0] == 0 and bounds[-1] == len(lengths)
    if not whole or (np.diff(bounds) < 0).any():
        raise DataError(
            f"{index}: its documents do not match its {len(lengths)} sequences; the index is "
            "damaged"
        )
    return pair


def _check_size(index: Path, header: Header) -> None:
    size = index.stat().st_size
    if size == header.file_size + header.sequences and header.sequences:
        raise DataError(f"{index}: an index of several modes (images); only text can be read")
    if not header.sequences or size != header.file_size:
        raise DataError(
            f"{index}: is truncated, or has no documents ({size} bytes; its header needs "
            f"{header.file_size})"
        )


@dataclass(frozen=True)
class Looked:
    """Counts over all tokens of a pair."""

    ended: int
    """Sequences that end with the end-of-document token."""
    eod_inside: int
    unknown: int
    checksums: Checksums


def look_at_all(
    pair: Pair, tokenizer: Tokenizer, progress: Callable[[int, int], None] | None = None
) -> Looked:
    """Read every token once, in chunks.

    Raises:
        DataError: naming the document and the id, if a token is not one of the tokenizer's.
    """
    ends = np.cumsum(pair.lengths, dtype=np.int64)
    last = ends[pair.lengths > 0] - 1
    checksums, size = Checksums(), tokenizer.vocabulary_size
    ended = eods = unknown = done = 0
    with pair.path(".bin").open("rb") as file:
        while data := file.read(_CHUNK):
            checksums.update(data)
            tokens = np.frombuffer(data, dtype=pair.dtype)
            if tokens.min() < 0 or tokens.max() >= size:
                position = int(np.flatnonzero((tokens < 0) | (tokens >= size))[0])
                number = int(np.searchsorted(ends, done + position, side="right"))
                raise DataError(
                    f"{pair.path('.bin')}: document {number} has token {tokens[position]}, but the "
                    f"tokenizer has {size} tokens; give the tokenizer that made the data"
                )
            first, stop = np.searchsorted(last, (done, done + len(tokens)))
            ended += int((tokens[last[first:stop] - done] == tokenizer.eod).sum())
            eods += int((tokens == tokenizer.eod).sum())
            if tokenizer.unknown is not None and tokenizer.unknown != tokenizer.eod:
                unknown += int((tokens == tokenizer.unknown).sum())
            done += len(tokens)
            if progress:
                progress(done, pair.tokens)
    return Looked(ended, eods - ended, unknown, checksums)
