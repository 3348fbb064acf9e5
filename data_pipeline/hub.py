"""Streams the rows of a Hugging Face Hub dataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_pipeline.records import DataError, RecordBlock
from data_pipeline.splits import SPLIT_WORDS

_ROWS = 1024


def hub_blocks(name: str, split: str) -> Iterator[RecordBlock]:
    """Blocks of the rows of one split; none if the dataset has no such split.

    Raises:
        DataError: if the Hub cannot be reached, at the start or later.
    """
    rows: list[Any] = []
    number = 1
    for row in _stream(name, split):
        rows.append(row)
        if len(rows) == _ROWS:
            yield RecordBlock(f"{name}[{split}]", number, rows)
            number += len(rows)
            rows = []
    if rows:
        yield RecordBlock(f"{name}[{split}]", number, rows)


def _stream(name: str, split: str) -> Iterator[Any]:
    import datasets

    try:
        available = datasets.get_dataset_split_names(name)
        matching = [
            candidate for candidate in available if SPLIT_WORDS.get(candidate, candidate) == split
        ]
        if matching:
            yield from datasets.load_dataset(name, split=matching[0], streaming=True)
    except Exception as error:  # the Hub client raises many kinds
        raise DataError(
            f"{name}: cannot reach this Hub dataset ({type(error).__name__}); check the name and "
            "the network, or give local files"
        ) from None
