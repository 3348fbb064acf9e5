"""The table of rank statistics of a run: written in parts, merged, with its definition of rank."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.files import replacing
from data_pipeline.strict_json import to_json
from pretrain.config.recipe import load_config
from pretrain.config.run import RanksConfig
from pretrain.errors import UsageError
from pretrain.ranks.columns import Columns, from_arrow
from pretrain.ranks.files import ROWS, pieces, reading, steps_in, table_in
from pretrain.ranks.probe import Row
from pretrain.ranks.schema import BY_NAME, COLUMNS, KEYS, Column

RANKS = "ranks.parquet"
_CONFIG = "config.yaml"
_PARTS = ".ranks"


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
    schemas = [table_in(file, pq.read_schema) for file in files]
    # Null columns of one file get the type that another file has.
    with reading(path):  # columns of one name may have types that do not go together
        schema = pa.unify_schemas(
            [part_schema.remove_metadata() for part_schema in schemas], promote_options="permissive"
        ).with_metadata(schemas[-1].metadata)
    chosen = _steps_of(files, until)
    with (
        replacing(path) as aside,
        aside.open("wb") as opened,  # Arrow accepts only UTF-8 paths
        pq.ParquetWriter(opened, schema) as writer,
    ):
        found = (table for file, steps in chosen for table in pieces(file, steps))
        for group in _groups(found, schema):
            writer.write_table(group)
    for part in parts:
        part.unlink()


def _groups(tables: Iterable[Any], schema: Any) -> Iterator[Any]:
    """Tables joined into groups of rows: thousands of small ones take more memory than their rows.

    Args:
        schema: the columns and types of the groups.
    """
    import pyarrow as pa

    waiting = [schema.empty_table()]
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= ROWS:
            yield pa.concat_tables(waiting, promote_options="permissive")
            waiting = [schema.empty_table()]
    if len(waiting) > 1:
        yield pa.concat_tables(waiting, promote_options="permissive")


def _steps_of(files: list[Path], until: int | None = None) -> list[tuple[Path, list[int]]]:
    """The file from which each step is taken, in order of steps."""
    owner: dict[int, Path] = {}
    for file in files:
        owner |= dict.fromkeys(table_in(file, steps_in), file)
    chosen: list[tuple[Path, list[int]]] = []
    for step in sorted(owner):
        if until is not None and step > until:
            continue
        if not chosen or chosen[-1][0] != owner[step]:
            chosen.append((owner[step], []))
        chosen[-1][1].append(step)
    return chosen


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
    definition: dict[str, Any] | None = table_in(files[0], _definition_in)
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
        for row in table_in(file).to_pylist():
            rows[tuple(row[name] for name in KEYS)] = row
    return sorted(rows.values(), key=lambda row: row["step"])


def measured_steps(run: Path) -> list[int]:
    """The steps of which the table or its parts have rows, in order."""
    return sorted(step for _, steps in _steps_of(_files(run)) for step in steps)


def read_rank_columns(
    run: Path,
    names: Sequence[str] | None = None,
    choose: Callable[[list[int]], Iterable[int]] | None = None,
) -> Columns:
    """The rows of `read_ranks`, column by column; of a step that two files have, the later's.

    Args:
        names: columns to read, beside those that name a row; default: all.
        choose: selects steps from those that were measured, which it gets in order; default: all.
            Only the rows of these steps are in memory.
    """
    import pyarrow as pa

    wanted = None if names is None else [*KEYS, *(name for name in names if name not in KEYS)]
    files = _steps_of(_files(run))
    steps = sorted(step for _, part in files for step in part)
    kept = set(steps if choose is None else choose(steps))
    tables = [
        table
        for file, part in files
        for table in pieces(file, [step for step in part if step in kept], wanted)
        if table.num_rows
    ]
    if not tables:
        return Columns({})
    with reading(run / RANKS):  # as in `_merge`
        table = pa.concat_tables(tables, promote_options="permissive")
    return from_arrow(_in_order(table))


def _in_order(table: Any) -> Any:
    """Rows in order of steps; of rows that name the same, the last."""
    import numpy as np
    import pyarrow as pa

    keys = np.stack([_numbers(table.column(name)) for name in KEYS])
    _, last = np.unique(keys[:, ::-1], axis=1, return_index=True)
    chosen = np.sort(len(table) - 1 - last)
    chosen = chosen[np.argsort(keys[0, chosen], kind="stable")]
    if len(chosen) < len(table) or (chosen[1:] < chosen[:-1]).any():
        table = table.take(pa.array(chosen))
    return table


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
