"""The table of rank statistics of a run: written in parts, merged, with its definition of rank."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.disk import open_regular
from data_pipeline.files import replacing
from data_pipeline.strict_json import to_json
from pretrain.config.recipe import load_config
from pretrain.config.run import RanksConfig
from pretrain.errors import RunError, UsageError
from pretrain.ranks.columns import Columns, from_arrow
from pretrain.ranks.probe import Row
from pretrain.ranks.schema import BY_NAME, COLUMNS, KEYS, TEXT_KEYS, Column

RANKS = "ranks.parquet"
_CONFIG = "config.yaml"
_PARTS = ".ranks"
_ROWS = 20_000
"""Number of rows in memory at once when a table is rewritten."""


def rewind_ranks(run: Path, step: int) -> None:
    """Remove measurements after ``step``."""
    for part in (run / _PARTS).glob("*.parquet"):
        if int(part.stem) > step:
            part.unlink()
    if (run / RANKS).exists():
        _merge(run, _parts(run), step)
        with contextlib.suppress(OSError):  # missing, or not a rank table
            (run / _PARTS).rmdir()


def add_ranks(run: Path, step: int, rows: list[Row], measured: RanksConfig) -> None:
    """Append one measurement; safe if the process is killed at any moment.

    Args:
        measured: the definition of the pseudo-rank in these rows, which the file records.
    """
    parts = run / _PARTS
    parts.mkdir(exist_ok=True)
    write_rows(parts / f"{step:08d}.parquet", rows, _definition_of(measured))


def merge_ranks(run: Path, always: bool = True) -> None:
    """Merge the measurements so far into ``ranks.parquet``, while training may add more.

    Only a few rows are in memory at a time. Rows that are added meanwhile wait for the next call.

    Args:
        always: merge even a few new rows; otherwise wait until they are a quarter of the table, so
            that a long run does not rewrite all of it at every checkpoint.
    """
    parts, path = _parts(run), run / RANKS
    new = sum(part.stat().st_size for part in parts)
    if parts and (always or not path.exists() or 4 * new >= path.stat().st_size):
        _merge(run, parts)
    if always:
        with contextlib.suppress(OSError):
            (run / _PARTS).rmdir()


def _parts(run: Path) -> list[Path]:
    return sorted((run / _PARTS).glob("*.parquet"))


def _merge(run: Path, parts: list[Path], until: int | None = None) -> None:
    """Write the table and its parts as one table, up to a step, and delete the parts.

    If a step was measured twice, the rows of the later file are kept. Rows are in order of steps.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = run / RANKS
    files = [*([path] if path.exists() else []), *parts]
    schemas = [_table_in(file, pq.read_schema) for file in files]
    # Null columns of one file get the type that another file has.
    with _reading(path):  # columns of one name may have types that do not go together
        schema = pa.unify_schemas(
            [part_schema.remove_metadata() for part_schema in schemas], promote_options="permissive"
        ).with_metadata(schemas[-1].metadata)
    chosen = _steps_of(files, until)
    with (
        replacing(path) as aside,
        aside.open("wb") as opened,  # Arrow accepts only UTF-8 paths
        pq.ParquetWriter(opened, schema) as writer,
    ):
        for file, steps in chosen:
            for table in _pieces(file, steps):
                if table.num_rows:
                    like = [schema.empty_table(), table]
                    writer.write_table(pa.concat_tables(like, promote_options="permissive"))
    for part in parts:
        part.unlink()


def _steps_of(files: list[Path], until: int | None) -> list[tuple[Path, list[int]]]:
    """The file from which each step is taken, in order of steps."""
    owner: dict[int, Path] = {}
    for file in files:
        owner |= dict.fromkeys(_table_in(file, _steps_in), file)
    chosen: list[tuple[Path, list[int]]] = []
    for step in sorted(owner):
        if until is not None and step > until:
            continue
        if not chosen or chosen[-1][0] != owner[step]:
            chosen.append((owner[step], []))
        chosen[-1][1].append(step)
    return chosen


def _pieces(file: Path, steps: list[int]) -> Iterator[Any]:
    """The rows of some steps, a limited number at a time."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(steps, pa.int64())
    with _reading(file), open_regular(file) as opened, _parquet(opened) as rows:
        # No threads of Arrow: they would compete with the training threads.
        for batch in rows.iter_batches(_ROWS, use_threads=False):
            table = _plain(pa.Table.from_batches([batch]))
            yield table.filter(pc.is_in(table.column("step"), value_set=wanted))


def _table_in(file: Path, read: Callable[[Any], Any] | None = None) -> Any:
    """Read a rank table, or apply another reader to its file.

    Raises:
        RunError: as `_reading`.
    """
    with _reading(file), open_regular(file) as opened:  # Arrow accepts only UTF-8 paths
        return (read or _bounded)(opened)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
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
    with pq.ParquetFile(opened) as file:
        rows, names = file.metadata.num_rows, file.schema_arrow.names
    if rows > max(_FEW_ROWS, size // _SMALLEST_ROW):
        raise ValueError(f"{rows:,} rows in {size:,} bytes")
    missing = [name for name in KEYS if name not in names]
    if rows and missing:
        raise ValueError(f"has no column {missing[0]}")
    return pq.ParquetFile(opened, read_dictionary=[name for name in TEXT_KEYS if name in names])


def _plain(table: Any) -> Any:
    """Rows with plain texts, after each column was checked."""
    import pyarrow as pa

    for name in table.schema.names:
        _check_column(name, table.column(name))
    plain = [
        pa.field(field.name, pa.string()) if field.name in TEXT_KEYS else field
        for field in table.schema
    ]
    return table.cast(pa.schema(plain, table.schema.metadata))


def _steps_in(opened: BinaryIO) -> list[int]:
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

    kind = column.type
    if name in TEXT_KEYS and pa.types.is_dictionary(kind):
        texts = [text for chunk in column.chunks for text in chunk.dictionary.to_pylist()]
        good = all(text and len(text) <= _LONGEST_TEXT for text in texts)
    elif name in KEYS:
        good = pa.types.is_integer(kind)
    else:  # earlier versions let Arrow guess the types of figures
        if name in BY_NAME and BY_NAME[name].type == "numbers" and pa.types.is_list(kind):
            kind = kind.value_type
        good = kind in (pa.float64(), pa.int64(), pa.bool_(), pa.null())
    if not good or (name in KEYS and column.null_count):
        raise ValueError(f"{name} is not a column of rank tables")


_DEFINITION = b"rankdecay.ranks"
"""Key of a table's Parquet metadata with its definition of the pseudo-rank, as JSON."""


def _definition_of(measured: RanksConfig) -> dict[str, Any]:
    return {"threshold": measured.threshold, "denominator": measured.denominator}


def ranks_definition(run: Path) -> dict[str, Any] | None:
    """The definition of the pseudo-ranks measured so far: threshold and denominator.

    Returns:
        None if nothing was measured; for a table without a definition, that of the run's recipe.
    """
    files = [
        file for file in (run / RANKS, *sorted((run / _PARTS).glob("*.parquet"))) if file.exists()
    ]
    if not files:
        return None
    definition: dict[str, Any] | None = _table_in(files[0], _definition_in)
    return definition or _definition_of(load_config(run / _CONFIG).ranks)


def _definition_in(opened: BinaryIO) -> dict[str, Any] | None:
    """The definition that a file records.

    Raises:
        ValueError: if it is damaged.
    """
    import pyarrow.parquet as pq

    recorded = (pq.read_schema(opened).metadata or {}).get(_DEFINITION)
    if recorded is None:
        return None
    definition = json.loads(recorded)
    if (
        not isinstance(definition, dict)
        or definition.keys() != _definition_of(RanksConfig()).keys()
    ):
        raise ValueError("its definition of the pseudo-rank has other keys")
    return definition


def check_definition(run: Path, measured: RanksConfig) -> None:
    """Refuse to continue with a table whose pseudo-ranks have another definition.

    Raises:
        UsageError: naming the key and both values.
    """
    before = ranks_definition(run)
    for key, value in (before or {}).items():
        if getattr(measured, key) != value:
            raise UsageError(
                f"ranks.{key}: {getattr(measured, key)} is not the {value} of {run / RANKS}, whose "
                f"column would mix both; keep {value}, or choose another --out"
            )


def read_ranks(run: Path) -> list[Row]:
    """All rows measured so far, in order of steps."""
    rows: dict[tuple[Any, ...], Row] = {}
    for file in _files(run):
        for row in _table_in(file).to_pylist():
            rows[tuple(row[name] for name in KEYS)] = row
    return sorted(rows.values(), key=lambda row: row["step"])


def read_rank_columns(run: Path) -> Columns:
    """The rows of `read_ranks`, column by column."""
    import numpy as np
    import pyarrow as pa

    tables = [_table_in(file) for file in _files(run)]
    if not any(table.num_rows for table in tables):
        return Columns({})
    with _reading(run / RANKS):  # as in `_merge`
        table = pa.concat_tables(tables, promote_options="permissive")
    keys = np.stack([_numbers(table.column(name)) for name in KEYS])
    # Of a row that is there twice the last counts.
    _, last = np.unique(keys[:, ::-1], axis=1, return_index=True)
    chosen = np.sort(len(table) - 1 - last)
    chosen = chosen[np.argsort(keys[0, chosen], kind="stable")]
    if len(chosen) < len(table) or (chosen[1:] < chosen[:-1]).any():
        table = table.take(pa.array(chosen))
    return from_arrow(table)


def _numbers(column: Any) -> Any:
    """Integers of a column that names rows; each text has one."""
    import pyarrow as pa

    if pa.types.is_string(column.type):
        column = column.combine_chunks().dictionary_encode().indices
    return column.to_numpy().astype("int64")


def _files(run: Path) -> list[Path]:
    """The table and the parts that are not in it yet."""
    return [*([run / RANKS] if (run / RANKS).exists() else []), *_parts(run)]


def write_rows(path: Path, rows: list[Row], definition: dict[str, Any] | None = None) -> None:
    """Write rows as Parquet, each column in its type, in the order of the schema.

    Args:
        definition: their definition of the pseudo-rank.

    Raises:
        ValueError: if a row has a column that is not in the schema.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = {name for row in rows for name in row}
    unknown = sorted(names - BY_NAME.keys())
    if unknown:
        raise ValueError(f"{unknown[0]} is not a column of pretrain.ranks.schema")
    schema = pa.schema(
        [pa.field(entry.name, _arrow_type(entry)) for entry in COLUMNS if entry.name in names],
        {_DEFINITION: to_json(definition).encode()} if definition else None,
    )
    table = pa.Table.from_pylist(rows, schema)
    with replacing(path) as aside, aside.open("wb") as opened:  # Arrow accepts only UTF-8 paths
        pq.write_table(table, opened)


def _arrow_type(column: Column) -> Any:
    import pyarrow as pa

    return {
        "integer": pa.int64(),
        "text": pa.string(),
        "number": pa.float64(),
        "truth": pa.bool_(),
        "numbers": pa.list_(pa.float64()),
    }[column.type]
