"""What a tokenizer was learned from: a record beside its file, read when it is used.

``texts.model`` has the record ``texts.model.json``. A tokenizer without one, or with another's, is
used without remarks.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.files import read_json, write_aside
from data_pipeline.records import ChoiceError
from data_pipeline.sources import Source
from data_pipeline.strict_json import to_json

_ENDING = ".json"
_NAMED = {"train": 0, "val": 100, "test": 100}
"""Percent of a source's documents that are held out, by the split of the whole source."""


def held_out_of(source: Source, split: str | None, shares: tuple[int, int, int]) -> int:
    """Percent of a source's documents that are held out: those whose hash is lowest."""
    return _NAMED.get(split or source.split or "", sum(shares[1:]))


def write_record(
    tokenizer: Path,
    model: bytes,
    sources: Sequence[Source],
    documents: int,
    split: str | None,
    shares: tuple[int, int, int],
    asked: dict[str, Any] | None = None,
) -> None:
    """Write what a tokenizer was learned from beside its file.

    Args:
        model: the content of the file.
        sources: those that were read.
        documents: number of texts that were read.
        split: the split of every source, whatever its name; None: by name, else divided.
        shares: percents of train, val and test, where documents are divided.
        asked: the other options of the command.
    """
    record = {
        "sha256": hashlib.sha256(model).hexdigest(),
        "documents": documents,
        "asked": asked,
        "sources": _entries(sources, split, shares),
    }
    path = tokenizer.with_name(tokenizer.name + _ENDING)
    write_aside(path, to_json(record, indent=1).encode())


def _entries(
    sources: Sequence[Source], split: str | None, shares: tuple[int, int, int]
) -> list[dict[str, Any]]:
    return [
        {
            "name": source.name,
            "size": source.size,
            "held_out_percent": held_out_of(source, split, shares),
        }
        for source in sources
    ]


def is_made(
    tokenizer: Path,
    sources: Sequence[Source],
    split: str | None,
    shares: tuple[int, int, int],
    asked: dict[str, Any],
) -> bool:
    """Whether a tokenizer is there that the same command made; the arguments are `write_record`'s.

    Raises:
        DataError: if another file is there, which may be in use: tokens without it are lost.
    """
    if not os.path.lexists(tokenizer):
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
        before = read_json(tokenizer.with_name(tokenizer.name + _ENDING))
        learned, wanted = _learned(tokenizer, sha256), _entries(sources, split, shares)
        files = [
            [(*_file(one["name"], one["size"]), one["held_out_percent"]) for one in entries]
            for entries in (learned, wanted)
        ]
        if before["asked"] == asked and files[0] == files[1]:
            return True
    raise ChoiceError(
        f"{tokenizer}: already exists, made from other sources or with other options; choose "
        "another --out, or delete it"
    )


def remarks(
    tokenizer: Path,
    sha256: str,
    sources: Sequence[Source],
    split: str | None,
    shares: tuple[int, int, int],
) -> list[str]:
    """What to know before these sources are tokenised with a tokenizer that has a record.

    A file is known again by its name without folders, and its size.

    Args:
        sha256: hash of the tokenizer.
    """
    learned = _learned(tokenizer, sha256)
    if not learned:
        return []
    by_file = {_file(one["name"], one["size"]): one for one in learned}
    both = [(source, by_file[_file(source.name, source.size)]) for source in sources
            if _file(source.name, source.size) in by_file]  # fmt: skip
    if not both:
        some = learned[0]["name"] + " …" * (len(learned) > 1)
        return [f"note: {tokenizer} was learned from other files ({some}) than the sources here"]
    for source, one in both:
        here, there = held_out_of(source, split, shares), one["held_out_percent"]
        if here > there:
            return [
                f"note: {tokenizer} was learned from {source.name} with {there} % of its documents "
                f"held out, and {here} % are held out here: it has seen some of them; to keep them "
                "apart, train it again with the same --split"
            ]
    return []


def _file(name: str, size: int) -> tuple[str, int]:
    return name.rpartition("/")[2], size


def _learned(tokenizer: Path, sha256: str) -> list[dict[str, Any]]:
    """The sources of a tokenizer; none if it has no record of its own that can be read."""
    try:
        record = read_json(tokenizer.with_name(tokenizer.name + _ENDING))
        if record["sha256"] != sha256:
            return []
        return [
            {
                "name": str(one["name"]),
                "size": int(one["size"]),
                "held_out_percent": int(one["held_out_percent"]),
            }
            for one in record["sources"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
