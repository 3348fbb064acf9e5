"""Raw documents: files in the Pile's formats, folders of them, and Hub datasets.

A source is read in blocks, cut at fixed places, so that work can be shared out, interrupted
and taken up again; parsing a block is a pure function that runs in any process.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK_BYTES = 4 << 20
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
SPLITS = ("train", "val", "test")
_SPLIT_WORDS = {"valid": "val", "validation": "val", "dev": "val"}
_SPLIT_PATTERN = re.compile(r"(?<![a-z])(train|val|valid|validation|dev|test)(?![a-z])")


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the mend."""


@dataclass(frozen=True)
class Fields:
    """Where a record keeps its text and subset; dots lead into objects."""

    text: str = "text"
    subset: str = "meta.pile_set_name"
    default_subset: str | None = None
    """Subset of records without one; None: such records are malformed."""


@dataclass(frozen=True)
class Document:
    """One text and where it belongs."""

    text: str
    subset: str


@dataclass(frozen=True)
class Block:
    """Some consecutive records of one source, not parsed yet."""

    name: str
    first: int
    """Number of the first record, counted from 1 (the line, in line-based files)."""
    records: list[Any]
    """Lines as bytes, or rows as mappings."""


@dataclass
class Parsed:
    """The documents of a block, and what was wrong with the others."""

    documents: list[Document] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """One file, or one split of a Hub dataset."""

    name: str
    split: str | None
    """train, val or test where the name says so; None: split by document."""
    size: int
    fingerprint: str
    """Cheap identity: hash of the size, the first and the last MiB (or the Hub name)."""
    open_blocks: Callable[[], Iterator[Block]] = field(compare=False, repr=False)


def find_sources(names: Iterable[str], hub_splits: tuple[str, ...] = SPLITS) -> list[Source]:
    """Sources for paths and Hub dataset names, in a fixed order.

    Args:
        names: files, folders, or ``owner/name`` of a Hub dataset.

    Raises:
        DataError: if a name is neither, or a folder has no usable file.
    """
    found: list[Source] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if _suffix(file))
            if not files:
                raise DataError(f"{name}: no {', '.join(SUFFIXES)} file in this folder")
            found += [_file_source(file, str(file.relative_to(path))) for file in files]
        elif path.is_file():
            if not _suffix(path):
                raise DataError(f"{name}: unknown kind of file; known: {', '.join(SUFFIXES)}")
            found.append(_file_source(path, path.name))
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.suffix:
            found += [_hub_source(name, split) for split in hub_splits]
        else:
            raise DataError(f"{name}: no such file or folder, nor a Hub dataset (owner/name)")
    if not found:
        raise DataError("no sources given")
    return found


def split_of(name: str) -> str | None:
    """The split that a relative path names, for example ``train/00.jsonl.zst``."""
    match = _SPLIT_PATTERN.search(name.lower())
    return _SPLIT_WORDS.get(match[1], match[1]) if match else None


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)


def _file_source(path: Path, relative: str) -> Source:
    readers: dict[str, Callable[[Path], Iterator[Block]]] = {
        ".parquet": _parquet_blocks,
        ".txt": _text_blocks,
    }
    reader = readers.get(_suffix(path) or "", _line_blocks)
    size = path.stat().st_size
    return Source(
        str(path), split_of(relative), size, _fingerprint(path, size), lambda: reader(path)
    )


def _fingerprint(path: Path, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Hash of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- readers --------------------------------------------------------------------------------


def _line_blocks(path: Path) -> Iterator[Block]:
    lines: list[bytes] = []
    size, first, number = 0, 1, 0
    for line in _lines(path):
        number += 1
        lines.append(line)
        size += len(line)
        if size >= BLOCK_BYTES:
            yield Block(str(path), first, lines)
            lines, size, first = [], 0, number + 1
    if lines:
        yield Block(str(path), first, lines)


def _lines(path: Path) -> Iterator[bytes]:
    rest = b""
    for chunk in _chunks(path):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _chunks(path: Path) -> Iterator[bytes]:
    """Decompressed bytes; a truncated or damaged archive is an error that names it."""
    if path.name.endswith(".zst"):
        yield from _zst_chunks(path)
        return
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            while chunk := file.read(1 << 20):
                yield chunk
    except (EOFError, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from None


def _zst_chunks(path: Path) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    started = False
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            while data:
                try:
                    output = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise _damaged(path, error) from None
                started = True
                if output:
                    yield output
                data = b""
                if frame.eof:  # an archive may be several frames, one after the other
                    data, started = frame.unused_data, False
                    frame = decompressor.decompressobj()
    if started:
        raise _damaged(path, "it ends inside a frame")


def _damaged(path: Path, reason: object) -> DataError:
    return DataError(
        f"{path}: the archive is truncated or damaged ({reason}); fetch it again, then repeat the "
        "command: finished files are kept"
    )


def _text_blocks(path: Path) -> Iterator[Block]:
    yield Block(str(path), 1, [{"text": path.read_bytes(), "subset": path.parent.name or "text"}])


def _parquet_blocks(path: Path) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 1
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                rows = batch.to_pylist()
                yield Block(str(path), number, rows)
                number += len(rows)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from None


def _hub_source(name: str, split: str) -> Source:
    identity = hashlib.sha256(f"hub:{name}:{split}".encode()).hexdigest()
    return Source(f"{name}[{split}]", split, 0, identity, lambda: _hub_blocks(name, split))


def _hub_blocks(name: str, split: str) -> Iterator[Block]:
    import datasets

    try:
        available = datasets.get_dataset_split_names(name)
        matching = [one for one in available if _SPLIT_WORDS.get(one, one) == split]
        if not matching:
            return
        stream = datasets.load_dataset(name, split=matching[0], streaming=True)
    except Exception as error:  # the Hub client raises many kinds
        raise DataError(
            f"{name}: cannot reach this Hub dataset ({type(error).__name__}); check the name and "
            "the network, or give local files"
        ) from None
    rows: list[Any] = []
    number = 1
    for row in stream:
        rows.append(row)
        if len(rows) == 1024:
            yield Block(f"{name}[{split}]", number, rows)
            number += len(rows)
            rows = []
    if rows:
        yield Block(f"{name}[{split}]", number, rows)


# --- parsing --------------------------------------------------------------------------------


def parse_block(block: Block, fields: Fields) -> Parsed:
    """Documents of a block; what is malformed is named ``file:line: reason`` and skipped."""
    parsed = Parsed()
    for number, record in enumerate(block.records, block.first):
        if isinstance(record, bytes) and not record.strip():
            continue
        try:
            parsed.documents.append(_document(record, fields))
        except ValueError as error:
            parsed.problems.append(f"{block.name}:{number}: {error}")
    return parsed


def _document(record: Any, fields: Fields) -> Document:
    if isinstance(record, bytes):
        try:
            record = json.loads(record.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"not valid UTF-8 at byte {error.start}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON ({error.msg})") from None
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
    elif isinstance(record.get("text"), bytes):  # a .txt file, whole
        try:
            text = record["text"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"not valid UTF-8 at byte {error.start}") from None
        return Document(text, fields.default_subset or record["subset"])
    text = _lookup(record, fields.text)
    if not isinstance(text, str):
        raise ValueError(f"no text in field {fields.text!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text has a lone surrogate, which is not valid UTF-8") from None
    subset = _lookup(record, fields.subset)
    if subset is None:
        subset = fields.default_subset
    if not isinstance(subset, str) or not subset:
        raise ValueError(f"no subset in field {fields.subset!r} (or give --default-subset)")
    if not text:
        raise ValueError("the text is empty")
    return Document(text, subset)


def _lookup(record: Any, path: str) -> Any:
    """``meta.pile_set_name`` in nested objects; an object may also be a JSON string."""
    value = record
    for part in path.split("."):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                return None
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def split_by_document(text: str) -> str:
    """train, val or test (98 : 1 : 1), decided by the text alone."""
    draw = hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=b"split").digest()[0] % 100
    return "test" if draw == 0 else "val" if draw == 1 else "train"
