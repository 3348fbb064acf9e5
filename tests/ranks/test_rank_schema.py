"""One schema of the rank table: what is measured, written, read and documented."""

from __future__ import annotations

import importlib
import math
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.factors import AttentionShape, Factors
from pretrain.config.run import RanksConfig
from pretrain.ranks import schema
from pretrain.ranks.probe import layer_rows
from pretrain.ranks.schema import BY_NAME, COLUMNS, KEYS, NEEDED, Column
from pretrain.ranks.table import add_ranks, merge_ranks, read_ranks, rewind_ranks
from pretrain.report import write_report
from pretrain.report.read_run import load_run
from pretrain.runs.folder import CONFIG
from pretrain.spectra import PairStatistics, ProductStatistics

PAGE = Path(__file__).resolve().parent.parent.parent / "docs/statistics.md"
ARROW = {
    "integer": pa.int64(),
    "text": pa.string(),
    "number": pa.float64(),
    "truth": pa.bool_(),
    "numbers": pa.list_(pa.float64()),
}
MEASURED = [column for column in COLUMNS if column.source != "label"]


def test_the_page_is_the_schema() -> None:
    assert schema.markdown() in PAGE.read_text(encoding="utf-8"), (
        "the table of docs/statistics.md should be:\n" + schema.markdown()
    )


def test_names_are_unique_and_statistics_have_theirs() -> None:
    assert len(BY_NAME) == len(COLUMNS)
    statistics = {
        field.name for kind in (ProductStatistics, PairStatistics) for field in fields(kind)
    }
    assert statistics == {
        one.name for one in COLUMNS if one.source in ("product", "pair", "spectrum")
    }


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_what_defines_a_column_is_there(column: Column) -> None:
    parts = column.defined.split(".")
    for count in range(len(parts), 0, -1):  # a module may be a part of a package, or not
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
            break
        except ModuleNotFoundError:
            continue
    for name in parts[count:]:
        has_field = name in getattr(found, "__dataclass_fields__", {})
        assert has_field or hasattr(found, name), column.defined
        found = None if has_field else getattr(found, name)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("rotary", [0, 4])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_measurement_has_every_column_and_no_other(
    tmp_path: Path, group: int, rotary: int, qk_norm: bool
) -> None:
    draws = torch.Generator().manual_seed(group)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draws)

    factors = Factors(drawn(2, group, 4, 8), drawn(2, 4, 8), drawn(2, 4, 8), drawn(2, group, 8, 4))
    shape = AttentionShape(1, 2 * group, 2, 4, 8, rotary, qk_norm)
    rows = layer_rows(factors, [0, 1], 0, shape, None, RanksConfig(spectra=True))
    for row in rows:
        row.update(step=3, tokens=99)
        assert row.keys() == {one.name for one in MEASURED}
        gone = {name for name in schema.OF_SIZES if row[name] != row[name]}
        pairs = set(schema.OF_PAIRS) & set(schema.OF_SIZES)
        if qk_norm and row["product"] == "qk":
            assert gone == set(schema.OF_SIZES)
        else:
            assert gone == (set() if rotary and row["product"] == "qk" else pairs)
    add_ranks(tmp_path, 3, rows, RanksConfig())
    merge_ranks(tmp_path)
    written = pq.read_schema(tmp_path / "ranks.parquet")
    assert written.names == [one.name for one in MEASURED]
    assert all(written.field(one.name).type == ARROW[one.type] for one in MEASURED)


def test_a_column_of_no_schema_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="depth is not a column"):
        add_ranks(tmp_path, 1, [{"step": 1, "depth": 2}], RanksConfig())
    assert not list((tmp_path / ".ranks").iterdir())


def old_rows(step: int, names: list[str], rng: random.Random) -> list[dict[str, Any]]:
    """Rows of an earlier version: some columns, in its own order, and one that is no more."""
    values: dict[str, Any] = {
        "integer": 8 * step, "number": rng.random(), "truth": False, "numbers": [2.0, 1.0],
    }  # fmt: skip
    rows = []
    for head in range(2):
        for product in ("qk", "vp"):
            row = {name: values.get(BY_NAME[name].type) for name in names}
            row |= {"step": step, "layer": 0, "head": head, "product": product, "level": "head"}
            rows.append({**{name: row[name] for name in names}, "spectral_gap": 0.25})
    return rows


@pytest.mark.parametrize("seed", range(8))
def test_tables_of_earlier_versions_are_read_and_added_to(tmp_path: Path, seed: int) -> None:
    """Any column set and order, with the types that Arrow guessed, and without a definition."""
    rng = random.Random(seed)
    optional = [one.name for one in MEASURED if one.name not in KEYS]
    names = [*KEYS, *rng.sample(optional, rng.randint(1, len(optional)))]
    rng.shuffle(names)
    before = [row for step in (2, 4) for row in old_rows(step, names, rng)]
    if "tokens" in names and seed % 2:
        for row in before:
            row["tokens"] = None
    pq.write_table(pa.Table.from_pylist(before), tmp_path / "ranks.parquet")
    assert read_ranks(tmp_path) == before
    now = [{key: row[key] for key in row if key != "spectral_gap"} | {"stable_rank": 1.5}
           for row in old_rows(6, names, rng)]  # fmt: skip
    add_ranks(tmp_path, 6, now, RanksConfig())
    for _ in ("beside it", "merged"):
        found = read_ranks(tmp_path)
        assert [{key: row[key] for key in row if row[key] is not None} for row in found] == [
            {key: row[key] for key in row if row[key] is not None} for row in [*before, *now]
        ]
        merge_ranks(tmp_path)
    rewind_ranks(tmp_path, 4)
    kept = {key for row in before for key in row}
    assert [{key: row[key] for key in kept} for row in read_ranks(tmp_path)] == before


def test_a_report_reads_the_columns_that_it_needs_and_no_others(
    trained: Path, tmp_path: Path
) -> None:
    """As of a version that measured less."""
    for path in trained.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    table = pq.read_table(trained / "ranks.parquet")
    pq.write_table(table.select(list(reversed(NEEDED))), tmp_path / "ranks.parquet")
    whole, less = load_run(trained), load_run(tmp_path)
    for name in ("pseudo_rank", "balance"):
        assert less.mean("qk", name) == whole.mean("qk", name)
    assert math.isnan(less.mean("qk", "a column of a later version"))
    write_report([tmp_path], tmp_path / "report.csv", "csv")
    assert (tmp_path / "report.csv").stat().st_size > 0
    assert (tmp_path / CONFIG).is_file()
    assert replace(less, path=whole.path).seed == whole.seed
