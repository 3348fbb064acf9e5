"""Rows of parquet files: the columns that are wanted, in slices whose texts fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline import readers
from data_pipeline.records import RECORD_BYTES, Block, DataError, Fields, Unreadable

_ROWS = 1024


def parquet_blocks(path: Path, fields: Fields) -> Iterator[Block]:
    """Blocks of the rows of a file, with the columns of text and subset alone.

    Raises:
        DataError: naming a file that is damaged, or of a kind that cannot be read.
    """
    import pyarrow as pa

    try:
        number = 1
        for rows in _rows(path, fields):
            yield Block(str(path), number, rows)
            number += len(rows)
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: parquet of a kind that cannot be read ({reason}); write it again with "
            "plain text columns"
        ) from None
    # What else the library raises for bytes that are no parquet: many kinds.
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise readers.damaged(path, error) from None


def _rows(path: Path, fields: Fields) -> Iterator[list[Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        metadata = file.metadata
        names = file.schema_arrow.names
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        text = _columns(fields.text, leaves)
        columns = sorted({*text, *_columns(fields.subset, leaves)}) if text else []
        packed = [one for one in _dictionary_columns(metadata, columns) if one in names]
        rows = _rows_at_once(metadata, columns)
    counted = 0
    # A value that a dictionary holds once may stand in each of a million rows: it stays so
    # until its slice of the rows becomes text.
    with pq.ParquetFile(path, read_dictionary=packed, page_checksum_verification=True) as file:
        if columns:
            for batch in file.iter_batches(batch_size=rows, columns=columns):
                for part in _slices(batch):
                    counted += len(part)
                    yield part
        else:
            held = ", ".join(repr(name)[:40] for name in names[:5])
            without = Unreadable(f"no column {fields.text!r} (the file has {held})")
            while counted < metadata.num_rows:
                part = [without] * min(_ROWS, metadata.num_rows - counted)
                counted += len(part)
                yield part
    if counted != metadata.num_rows:
        raise readers.damaged(path, f"{counted:,} of {metadata.num_rows:,} rows are there")


def _columns(wanted: str, leaves: list[str]) -> list[str]:
    """Leaf columns that hold a field: itself, a string of JSON on the way to it, or a map."""
    parts = wanted.split(".")
    for count in range(len(parts), 0, -1):
        prefix = ".".join(parts[:count])
        pairs = tuple(f"{prefix}.{group}." for group in ("key_value", "map", "entries"))
        found = [leaf for leaf in leaves if leaf == prefix or leaf.startswith(pairs)]
        if found:
            return found
    return []


def _chunks_of(metadata: Any, columns: list[str]) -> Iterator[Any]:
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            if row_group.column(index).path_in_schema in columns:
                yield row_group.column(index)


def _dictionary_columns(metadata: Any, columns: list[str]) -> list[str]:
    return sorted(
        {
            chunk.path_in_schema
            for chunk in _chunks_of(metadata, columns)
            if chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page
        }
    )


def _rows_at_once(metadata: Any, columns: list[str]) -> int:
    """Rows a batch, fewer where they are long."""
    longest = max(
        (chunk.total_uncompressed_size / max(1, chunk.num_values)
         for chunk in _chunks_of(metadata, columns)),
        default=0.0,
    )  # fmt: skip
    return max(1, min(_ROWS, int(readers.BLOCK_BYTES / max(1.0, longest))))


def _slices(batch: Any) -> Iterator[list[Any]]:
    """Rows of a batch, few at a time where their texts are long."""
    size = _unpacked_size(batch)
    if batch.num_rows > 1 and size > readers.BLOCK_BYTES:
        half = batch.num_rows // 2
        yield from _slices(batch.slice(0, half))
        yield from _slices(batch.slice(half))
    elif size > RECORD_BYTES:
        yield [readers.too_long(size)]
    elif batch.num_rows:
        yield _readable(batch)


def _unpacked_size(batch: Any) -> int:
    """Bytes of a batch whose dictionaries are written out."""
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
    """Rows as mappings; where one is not to be had, its reason instead."""
    try:
        return list(batch.to_pylist())
    except Exception:  # text that is no UTF-8, dates beyond the calendar, unknown zones
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
