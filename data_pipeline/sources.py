"""Raw documents: files in the Pile's formats, folders of them, and Hub datasets.

A source is read in blocks with fixed boundaries, so that work can be divided, interrupted and
resumed; parsing a block is a pure function that can run in any process.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_pipeline.folders import SUFFIXES, list_folder, suffix_of
from data_pipeline.hub import hub_blocks
from data_pipeline.parquet_rows import parquet_blocks
from data_pipeline.readers import WINDOW_MB, line_blocks, text_blocks
from data_pipeline.records import (
    ChoiceError,
    DataError,
    Document,
    Fields,
    Parsed,
    RecordBlock,
    parse_block,
)
from data_pipeline.splits import SPLITS, Place, splits_of

__all__ = [
    "SPLITS",
    "ChoiceError",
    "DataError",
    "Document",
    "Fields",
    "Parsed",
    "RecordBlock",
    "Source",
    "find_sources",
    "parse_block",
    "sha256_of",
]  # fmt: skip

Tell = Callable[[str], None]
"""A function that is called with a line to print."""


@dataclass(frozen=True)
class Source:
    """One file, or one split of a Hub dataset."""

    name: str
    split: str | None
    """train, val or test if the name means a split; None: divided by document."""
    path: Path | None
    """None: a Hub dataset."""
    stamp: tuple[int, int, int]
    """Size, and the times of the last change of contents and of anything, in nanoseconds."""
    blocks: Callable[[Fields], Iterator[RecordBlock]] = field(compare=False, repr=False)

    @property
    def size(self) -> int:
        """Bytes of the file; 0 for a Hub dataset."""
        return self.stamp[0]

    def open_blocks(self, fields: Fields | None = None) -> Iterator[RecordBlock]:
        """The records, in blocks.

        Args:
            fields: the needed fields; of parquet files nothing else is read.
        """
        return self.blocks(fields or Fields())


def find_sources(
    names: Iterable[str],
    hub_splits: tuple[str, ...] = SPLITS,
    window_mb: int = WINDOW_MB,
    tell: Tell | None = None,
    left_out: list[str] | None = None,
) -> list[Source]:
    """Sources for paths and Hub dataset names, in a fixed order.

    Args:
        names: files, folders, or ``owner/name`` of a Hub dataset.
        window_mb: memory that a zstd archive may request.
        tell: called with a line about names that may mean a split.
        left_out: gets a line for each kind of file that is left out.

    Raises:
        DataError: if a name is none of these, or a folder has no usable file.
    """
    say: Tell = tell or (lambda line: None)
    omitted = left_out if left_out is not None else []
    files: list[tuple[Path, Place]] = []
    hubs: list[Source] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            files += _files_of_folder(path, omitted)
        elif path.is_file():
            if not suffix_of(path):
                raise ChoiceError(f"{name}: unknown file type; known: {', '.join(SUFFIXES)}")
            files.append((path, _place(path, len(_parts(path)) - 1)))
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.suffix and not _exists(path):
            hubs += [_hub_source(name, split) for split in hub_splits]
        elif path.exists():
            raise ChoiceError(f"{name}: not a regular file or folder")
        else:
            raise ChoiceError(f"{name}: no such file or folder, nor a Hub dataset (owner/name)")
    sources = _file_sources(files, window_mb, say, omitted)
    if not sources and not hubs:
        raise ChoiceError("no sources given")
    return [*sources, *hubs]


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _files_of_folder(folder: Path, left_out: list[str]) -> list[tuple[Path, Place]]:
    listing = list_folder(folder)
    left_out += [f"left out of {folder}: {line}" for line in listing.lines()]
    if not listing.files:
        raise ChoiceError(f"{folder}: has no {', '.join(SUFFIXES)} file that is not empty")
    first_part = len(_parts(folder)) - 1
    return [(file, _place(file, first_part)) for file in listing.files]


def _file_sources(
    files: list[tuple[Path, Place]], window_mb: int, say: Tell, left_out: list[str]
) -> list[Source]:
    """Each file once with its split, however many names and links lead to it."""
    splits, passed = splits_of([place for _, place in files])
    by_file: dict[str, Source] = {}
    for (path, _), split in zip(files, splits, strict=True):
        source = _file_source(path, split, window_mb)
        real = os.path.realpath(path)
        if real not in by_file:
            by_file[real] = source
            continue
        first = by_file[real]
        if None not in (split, first.split) and split != first.split:
            raise ChoiceError(f"{path}: is {first.name}, once in {first.split}, once in {split}")
        left_out.append(f"left out: {path}, which is the same file as {first.name}")
        by_file[real] = replace(first, split=first.split or split)
    if passed:
        some = ", ".join(str(files[number][0]) for number in passed[:3])
        say(
            f"{len(passed)} file(s) whose name contains a split's word but means no split: {some};"
            " divided 98 : 1 : 1 by document (--split changes this)"
        )
    return list(by_file.values())


def _parts(path: Path) -> tuple[str, ...]:
    return Path(os.path.abspath(path)).parts  # noqa: PTH100  (a link keeps the name it was given)


def _place(path: Path, first_part: int) -> Place:
    parts = _parts(path)
    name = parts[-1][: -len(suffix_of(path) or "") or None]
    return Place((*parts[:-1], name), first_part)


def _file_source(path: Path, split: str | None, window_mb: int) -> Source:
    suffix = suffix_of(path)

    def blocks(fields: Fields) -> Iterator[RecordBlock]:
        if suffix == ".parquet":
            return parquet_blocks(path, fields)
        return text_blocks(path) if suffix == ".txt" else line_blocks(path, window_mb)

    return Source(str(path), split, path, stamp_of(path), blocks)


def stamp_of(path: Path) -> tuple[int, int, int]:
    """Size and times of a file, which show whether it may have changed."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def sha256_of(path: Path) -> str:
    """Hash of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hub_source(name: str, split: str) -> Source:
    return Source(
        f"{name}[{split}]", split, None, (0, 0, 0), lambda fields: hub_blocks(name, split)
    )
