"""Reads rows of parquet files: only the needed columns, in slices whose texts fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline import readers
from data_pipeline.records import RECORD_BYTES, DataError, Fields, RecordBlock, Unreadable

_ROWS = 1024
_ROWS_AT_ONCE = 64
"""Number of rows that the library unpacks before their size is known."""


def parquet_blocks(path: Path, fields: Fields) -> Iterator[RecordBlock]:
    """Blocks of the rows of a file, with only the columns of text and subset.

    Raises:
        DataError: naming a file that is damaged, or of a kind that cannot be read.
    """
    import pyarrow as pa

    try:
        number = 1
        for rows in _rows(path, fields):
            yield RecordBlock(str(path), number, rows)
            number += len(rows)
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: this kind of parquet cannot be read ({reason}); write it again with plain "
            "text columns"
        ) from None
    # For bytes that are not parquet, the library raises many kinds of exceptions.
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise readers.damaged(path, error) from None


def _rows(path: Path, fields: Fields) -> Iterator[list[Any]]:
    import pyarrow.parquet as pq

    # Do not read metadata of row groups or columns: if they are damaged, the library aborts the
    # process.
    with pq.ParquetFile(path) as file:
        wanted, groups = file.metadata.num_rows, file.metadata.num_row_groups
        names = file.schema_arrow.names
        leaves = [file.schema.column(i) for i in range(len(file.schema))]
    paths = [leaf.path for leaf in leaves]
    text = _columns(fields.text, paths)
    if not text:
        shown = ", ".join(repr(name)[:40] for name in names[:5])
        yield from _without(f"no column {fields.text!r} (the file has {shown})", wanted)
        return
    columns = sorted({*text, *_columns(fields.subset, paths)})
    # A value that a dictionary holds once may occur in each of a million rows: it stays in the
    # dictionary until its slice of the rows becomes text.
    packed = [column.path for column in leaves if column.physical_type == "BYTE_ARRAY"]
    packed = [leaf for leaf in packed if leaf in columns and leaf in names]
    counted, size = 0, 0
    rows: list[Any] = []
    with pq.ParquetFile(path, read_dictionary=packed, page_checksum_verification=True) as file:
        for group in range(groups):
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns):
                for part, bytes_of in _slices(batch):
                    rows += part
                    size += bytes_of
                    counted += len(part)
                    if size >= readers.BLOCK_BYTES or len(rows) >= _ROWS:
                        yield rows
                        rows, size = [], 0
    if rows:
        yield rows
    if counted != wanted:
        raise readers.damaged(path, f"{counted:,} rows, but the file claims {wanted:,}")


def _without(reason: str, rows: int) -> Iterator[list[Any]]:
    for start in range(0, rows, _ROWS):
        yield [Unreadable(reason)] * min(_ROWS, rows - start)


def _columns(wanted: str, leaves: list[str]) -> list[str]:
    """Leaf columns that contain a field: itself, a JSON string on the path to it, or a map."""
    parts = wanted.split(".")
    for count in range(len(parts), 0, -1):
        prefix = ".".join(parts[:count])
        pairs = tuple(f"{prefix}.{group}." for group in ("key_value", "map", "entries"))
        matches = [leaf for leaf in leaves if leaf == prefix or leaf.startswith(pairs)]
        if matches:
            return matches
    return []


def _slices(batch: Any) -> Iterator[tuple[list[Any], int]]:
    """Rows of a batch and their bytes, few at a time if their texts are long."""
    size = _unpacked_size(batch)
    if batch.num_rows > 1 and size > readers.BLOCK_BYTES:
        half = batch.num_rows // 2
        yield from _slices(batch.slice(0, half))
        yield from _slices(batch.slice(half))
    elif size > RECORD_BYTES:
        yield [readers.too_long(size)], 0
    elif batch.num_rows:
        yield _readable(batch), size


def _unpacked_size(batch: Any) -> int:
    """Bytes of a batch with its dictionaries expanded."""
    import pyarrow as pa
    import pyarrow.compute as pc

    total = 0
    for column in batch.columns:
        if pa.types.is_dictionary(column.type):
            lengths = pc.binary_length(column.dictionary).take(column.indices)
            total += pc.sum(lengths).as_py() or 0
        else:
            total += column.nbytes
    return total


def _readable(batch: Any) -> list[Any]:
    """Rows as mappings; for a row that cannot be read, the reason instead."""
    try:
        return list(batch.to_pylist())
    except Exception:  # text that is not UTF-8, dates beyond the calendar, unknown time zones
        pass
    rows: list[Any] = []
    for number in range(batch.num_rows):
        try:
            rows += batch.slice(number, 1).to_pylist()
        except UnicodeDecodeError as error:
            rows.append(Unreadable(f"not valid UTF-8 at byte {error.start}"))
        except Exception as error:
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            rows.append(Unreadable(f"cannot be read ({reason})"))
    return rows
