"""The table of rank statistics of a run: measured part by part, merged, and what it means."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.files import open_regular, replacing
from data_pipeline.strict_json import to_json
from pretrain.config import load_config
from pretrain.errors import RunError, UsageError
from pretrain.probe import Row
from pretrain.run_config import RanksConfig

RANKS = "ranks.parquet"
_CONFIG = "config.yaml"
_PARTS = ".ranks"


def rewind_ranks(run: Path, step: int) -> None:
    """Forget what was measured after ``step``."""
    parts = run / _PARTS
    if parts.is_dir():
        for part in parts.glob("*.parquet"):
            if int(part.stem) > step:
                part.unlink()
    path = run / RANKS
    if path.exists():
        rows = [row for row in read_ranks(run) if row["step"] <= step]
        _write_parquet(path, rows, ranks_definition(run))
        shutil.rmtree(parts, ignore_errors=True)


def add_ranks(run: Path, step: int, rows: list[Row], measured: RanksConfig) -> None:
    """Append one measurement; safe against a kill at any moment.

    Args:
        measured: what a pseudo-rank means in these rows; the file says it.
    """
    parts = run / _PARTS
    parts.mkdir(exist_ok=True)
    _write_parquet(parts / f"{step:08d}.parquet", rows, _definition_of(measured))


def merge_ranks(run: Path, always: bool = True) -> None:
    """Bring the measurements so far into ``ranks.parquet``.

    Rows stay columns of Arrow, no objects of Python: a checkpoint waits for this.

    Args:
        always: merge however little is new; otherwise once it is a quarter of the table, so that
            a long run does not write all of it at every checkpoint.
    """
    parts = sorted((run / _PARTS).glob("*.parquet"))
    path = run / RANKS
    if not parts:
        return
    if path.exists():
        new = sum(part.stat().st_size for part in parts)
        if not always and 4 * new < path.stat().st_size:
            return
        parts = [path, *parts]
    _write_table(path, _joined([_table_in(part) for part in parts]))
    shutil.rmtree(run / _PARTS)


def _joined(tables: list[Any]) -> Any:
    """One table in order of steps; of a step that was measured twice, the later table's rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kept: list[Any] = []
    seen = pa.array([], pa.int64())
    for table in reversed([one for one in tables if one.num_rows]):
        again = pc.is_in(table.column("step"), value_set=seen)
        kept.insert(0, table.filter(pc.invert(again)))
        seen = pc.unique(pa.chunked_array([seen, pc.unique(table.column("step"))]))
    # Null columns of one part take the type that another has.
    whole = pa.concat_tables(kept, promote_options="permissive")
    order = pc.sort_indices(whole, [("step", "ascending")])
    return whole.take(order).replace_schema_metadata(tables[-1].schema.metadata)


def _table_in(file: Path, read: Callable[[Any], Any] | None = None) -> Any:
    """A table that was measured, or what another reader makes of its file.

    Raises:
        RunError: if it is damaged, or stands for more than it can hold.
    """
    try:
        with open_regular(file) as opened:  # Arrow takes no path that is not UTF-8
            return (read or _bounded)(opened)
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{file}: damaged ({reason}); delete it to go on without it") from None


_TEXTS = ("product", "level")
_KEYS = ("step", "layer", *_TEXTS, "head")
"""What names a row."""
_SPECTRUM = "singular_values"
_LONGEST_TEXT = 20
_FEW_ROWS, _SMALLEST_ROW = 250_000, 8
"""Rows that any file may have, and bytes for each of more: a row has some twenty figures."""


def _bounded(opened: BinaryIO) -> Any:
    """The table of a file, its types as they were written; a few bytes cannot stand for many.

    Raises:
        ValueError: if it is not one of ours.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = os.fstat(opened.fileno()).st_size
    with pq.ParquetFile(opened) as file:
        rows, names = file.metadata.num_rows, file.schema_arrow.names
    if rows > max(_FEW_ROWS, size // _SMALLEST_ROW):
        raise ValueError(f"{rows:,} rows in {size:,} bytes")
    missing = [name for name in _KEYS if name not in names]
    if rows and missing:
        raise ValueError(f"has no column {missing[0]}")
    texts = [name for name in _TEXTS if name in names]
    with pq.ParquetFile(opened, read_dictionary=texts) as file:
        table = file.read()
    for name in names:
        _check_column(name, table.column(name))
    plain = [pa.field(one.name, pa.string()) if one.name in _TEXTS else one for one in table.schema]
    return table.cast(pa.schema(plain, table.schema.metadata))


def _check_column(name: str, column: Any) -> None:
    """See that a column has what ours have: texts of a few letters, else numbers.

    Raises:
        ValueError: naming the column.
    """
    import pyarrow as pa

    kind = column.type
    if name in _TEXTS and pa.types.is_dictionary(kind):
        texts = [one for chunk in column.chunks for one in chunk.dictionary.to_pylist()]
        good = all(one and len(one) <= _LONGEST_TEXT for one in texts)
    elif name in _KEYS:
        good = pa.types.is_integer(kind)
    else:
        if name == _SPECTRUM and pa.types.is_list(kind):
            kind = kind.value_type
        good = kind in (pa.float64(), pa.int64(), pa.bool_(), pa.null())
    if not good or (name in _KEYS and column.null_count):
        raise ValueError(f"{name} is none of our columns")


_DEFINITION = b"rankdecay.ranks"
"""Key of a table's Parquet metadata: what a pseudo-rank means in it, as JSON."""


def _definition_of(measured: RanksConfig) -> dict[str, Any]:
    return {"threshold": measured.threshold, "denominator": measured.denominator}


def ranks_definition(run: Path) -> dict[str, Any] | None:
    """What the pseudo-ranks measured so far mean: threshold and denominator.

    Returns:
        None where nothing was measured; of a table that does not say, what the run's recipe says.
    """
    import pyarrow.parquet as pq

    files = [
        one for one in (run / RANKS, *sorted((run / _PARTS).glob("*.parquet"))) if one.exists()
    ]
    if not files:
        return None
    said = (_table_in(files[0], pq.read_schema).metadata or {}).get(_DEFINITION)
    if said is not None:
        return dict(json.loads(said))
    return _definition_of(load_config(run / _CONFIG).ranks)


def check_definition(run: Path, measured: RanksConfig) -> None:
    """Refuse to go on with a table whose pseudo-ranks mean something else.

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
    """Every row measured so far, in order of steps."""
    files = [run / RANKS] if (run / RANKS).exists() else []
    files += sorted((run / _PARTS).glob("*.parquet"))
    rows: dict[tuple[Any, ...], Row] = {}
    for file in files:
        for row in _table_in(file).to_pylist():
            rows[tuple(row[name] for name in _KEYS)] = row
    return sorted(rows.values(), key=lambda row: row["step"])


def _write_parquet(path: Path, rows: list[Row], definition: dict[str, Any] | None = None) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    if definition:
        table = table.replace_schema_metadata({_DEFINITION: to_json(definition).encode()})
    _write_table(path, table)


def _write_table(path: Path, table: Any) -> None:
    import pyarrow.parquet as pq

    with replacing(path) as aside, aside.open("wb") as opened:  # Arrow takes UTF-8 paths alone
        pq.write_table(table, opened)
