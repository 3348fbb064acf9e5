"""Reads the files of rank tables, which may be damaged or come from somebody else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.disk import open_regular
from pretrain.errors import RunError
from pretrain.ranks.schema import BY_NAME, KEYS, TEXT_KEYS

ROWS = 20_000
"""Number of rows in memory at once when a table is read in pieces."""


def pieces(file: Path, steps: list[int], names: list[str] | None = None) -> Iterator[Any]:
    """The rows of some steps, a limited number at a time.

    Args:
        names: the columns to read, of those that there are; default: all.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(steps, pa.int64())
    with reading(file), open_regular(file) as opened, _parquet(opened) as rows:
        # No threads of Arrow: they would compete with the training threads.
        present = set(rows.schema_arrow.names)
        columns = None if names is None else [name for name in names if name in present]
        for batch in rows.iter_batches(ROWS, columns=columns, use_threads=False):
            table = _plain(pa.Table.from_batches([batch]))
            yield table.filter(pc.is_in(table.column("step"), value_set=wanted))


def table_in(file: Path, read: Callable[[Any], Any] | None = None) -> Any:
    """Read a rank table, or apply another reader to its file.

    Raises:
        RunError: as `reading`.
    """
    with reading(file), open_regular(file) as opened:  # Arrow accepts only UTF-8 paths
        return (read or _bounded)(opened)


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """During a block that reads a rank table, say of any error that the table is damaged.

    Raises:
        RunError: if it is damaged, or claims more rows than it can contain.
    """
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{file}: damaged ({reason}); delete it to continue without it") from None


_LONGEST_TEXT = 20
_FEW_ROWS, _SMALLEST_ROW = 250_000, 8
"""Number of rows that any file may have, and bytes per row beyond that (a row has some 20
values)."""


def _bounded(opened: BinaryIO) -> Any:
    """The table of a file, with its types as written; a small file cannot expand to a huge table.

    Raises:
        ValueError: if it is not a rank table.
    """
    with _parquet(opened) as file:
        return _plain(file.read())


def _parquet(opened: BinaryIO) -> Any:
    """Open a file whose rows are safe to read; texts are dictionaries, with each text once.

    Raises:
        ValueError: if it claims more rows than it can contain, or lacks a column.
    """
    import pyarrow.parquet as pq

    size = os.fstat(opened.fileno()).st_size
    metadata = pq.read_metadata(opened)  # of a table of many row groups it takes most of the memory
    rows, names = metadata.num_rows, metadata.schema.to_arrow_schema().names
    if rows > max(_FEW_ROWS, size // _SMALLEST_ROW):
        raise ValueError(f"{rows:,} rows in {size:,} bytes")
    missing = [name for name in KEYS if name not in names]
    if rows and missing:
        raise ValueError(f"has no column {missing[0]}")
    texts = [name for name in TEXT_KEYS if name in names]
    return pq.ParquetFile(opened, metadata=metadata, read_dictionary=texts)


def _plain(table: Any) -> Any:
    """Rows with plain texts, after each column was checked; without lists that are all missing."""
    import pyarrow as pa

    for name in table.schema.names:
        _check_column(name, table.column(name))
    table = table.drop_columns(
        [
            field.name
            for field in table.schema
            if _holds_lists(field.name) and pa.types.is_null(field.type)
        ]
    )
    plain = [
        pa.field(field.name, pa.string()) if field.name in TEXT_KEYS else field
        for field in table.schema
    ]
    return table.cast(pa.schema(plain, table.schema.metadata))


def steps_in(opened: BinaryIO) -> list[int]:
    """The steps of which a file has rows."""
    with _parquet(opened) as file:
        if "step" not in file.schema_arrow.names:  # nothing was measured
            return []
        column = file.read(columns=["step"]).column("step")
    _check_column("step", column)
    steps: list[int] = column.unique().to_pylist()
    return steps


def _check_column(name: str, column: Any) -> None:
    """Check that a column has values of the right kind: short texts or numbers.

    Raises:
        ValueError: naming the column.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if name in TEXT_KEYS and pa.types.is_dictionary(kind):
        texts = [text for chunk in column.chunks for text in chunk.dictionary.to_pylist()]
        good = all(text and len(text) <= _LONGEST_TEXT for text in texts)
    elif name in KEYS:
        good = pa.types.is_integer(kind)
    else:  # earlier versions let Arrow guess the types of figures
        in_lists = _holds_lists(name) and kind != pa.null()
        if in_lists and pa.types.is_list(kind):
            values = pc.list_flatten(column)
            kind, in_lists = values.type, values.null_count > 0
        good = not in_lists and kind in (pa.float64(), pa.int64(), pa.bool_(), pa.null())
    if not good or (name in KEYS and column.null_count):
        raise ValueError(f"{name} is not a column of rank tables")


def _holds_lists(name: str) -> bool:
    return name in BY_NAME and BY_NAME[name].type == "numbers"
