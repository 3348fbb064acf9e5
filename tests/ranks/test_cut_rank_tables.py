"""A rank table that is cut, or has columns of other types: every reader says so in one line."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.config.run import RanksConfig
from pretrain.errors import RunError
from pretrain.ranks.columns import column_of
from pretrain.ranks.table import (
    add_ranks,
    check_definition,
    merge_ranks,
    read_rank_columns,
    rewind_ranks,
)
from pretrain.report import write_report
from pretrain.report.read_run import load_run
from tests.fake_runs import recipe, write_run
from tests.ranks.test_rank_table import rows_of

pytestmark = pytest.mark.slow

MEASURED = RanksConfig(threshold=0.9)
READERS: dict[str, Callable[[Path], Any]] = {
    "rewind": lambda run: rewind_ranks(run, 2),
    "merge": merge_ranks,
    "definition": lambda run: check_definition(run, MEASURED),
    "columns": read_rank_columns,
}
COLUMNS: dict[str, Any] = {
    "texts": "x", "bytes": b"\xff", "lists": [1.0], "mappings": {"a": 1},
}  # fmt: skip
DEFINITIONS = (b"{", b"[]", b"1", b"{}", b"null", b'{"threshold": 1}', b'{"other": 1}', b"\xff")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("where", ["ranks.parquet", ".ranks/00000004.parquet"])
def test_columns_of_other_types(where: str, kind: str, reader: str, tmp_path: Path) -> None:
    """Each column in turn, in the table or in a part of it; the table stays as it is."""
    for name in ("step", "product", "head", "pseudo_rank", "singular_values"):
        run = tmp_path / name
        run.mkdir()
        add_ranks(run, 2, rows_of(2, 1.0), MEASURED)
        merge_ranks(run)
        add_ranks(run, 4, rows_of(4, 1.0), MEASURED)
        table = pq.read_table(run / where)
        odd = pa.array([COLUMNS[kind]] * len(table))
        if (name, kind) in {("product", "texts"), ("singular_values", "lists")}:
            continue
        pq.write_table(table.set_column(table.column_names.index(name), name, odd), run / where)
        before = (run / "ranks.parquet").read_bytes()
        try:
            READERS[reader](run)
        except RunError as error:
            assert str(run) in str(error) and "damaged" in str(error), error
            assert (run / "ranks.parquet").read_bytes() == before
        else:  # it does not read what is damaged
            assert reader == "definition" or (reader, where[0]) == ("rewind", "."), name


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_definitions_that_are_damaged(definition: bytes, tmp_path: Path) -> None:
    add_ranks(tmp_path, 2, rows_of(2, 1.0), MEASURED)
    merge_ranks(tmp_path)
    table = pq.read_table(tmp_path / "ranks.parquet")
    pq.write_table(
        table.replace_schema_metadata({b"rankdecay.ranks": definition}), tmp_path / "ranks.parquet"
    )
    with pytest.raises(RunError, match=r"ranks\.parquet: damaged"):
        check_definition(tmp_path, MEASURED)


def test_a_report_refuses_a_table_that_is_cut(trained: Path, tmp_path: Path) -> None:
    """At every row: the rows of a step are there for both products, or the step is named."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    table = pq.read_table(run / "ranks.parquet")
    refused = 0
    for rows in range(1, len(table) + 1):
        pq.write_table(table.slice(0, rows), run / "ranks.parquet")
        heads = {(row["step"], row["product"]) for row in table.slice(0, rows).to_pylist()
                 if row["level"] == "head"}  # fmt: skip
        steps = set(table.slice(0, rows).column("step").to_pylist())
        whole = heads == {(step, product) for step in steps for product in ("qk", "vp")}
        try:
            loaded = load_run(run)
            assert whole and max(column_of(loaded.ranks, "step")) == max(steps)
        except RunError as error:
            assert not whole and str(run / "ranks.parquet") in str(error) and "step" in str(error)
            refused += 1
    assert 0 < refused < len(table)


@pytest.mark.parametrize("missing", ["all", "all but the last", "first", "none"])
def test_spectra_that_are_missing(missing: str, tmp_path: Path) -> None:
    """`ranks.spectra` may be set when a run is resumed: earlier rows have no singular values."""
    run = write_run(tmp_path / "run", recipe(), np.random.default_rng(0))
    table = pq.read_table(run / "ranks.parquet")
    steps = table.column("step").to_pylist()
    has: Callable[[int], bool] = {
        "all": lambda step: False, "all but the last": lambda step: step == max(steps),
        "first": lambda step: step > min(steps), "none": lambda step: True,
    }[missing]  # fmt: skip
    values = pa.array([[2.0, 1.0] if has(step) else None for step in steps])
    pq.write_table(table.append_column("singular_values", values), run / "ranks.parquet")
    write_report([run], tmp_path / "out.html", unfinished=True)
    page = (tmp_path / "out.html").read_text()
    assert ('id="spectra"' in page) == (missing != "all")


@pytest.mark.parametrize("values", [1.0, math.nan, [None], ["x"]])
def test_spectra_that_are_none(values: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", recipe(), np.random.default_rng(0))
    table = pq.read_table(run / "ranks.parquet")
    odd = pa.array([values] * len(table))
    pq.write_table(table.append_column("singular_values", odd), run / "ranks.parquet")
    with pytest.raises(RunError, match="singular_values is not a column"):
        load_run(run)
