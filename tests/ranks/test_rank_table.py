"""A run's table of rank statistics: merged without objects of Python, and what it means."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.config.run import RanksConfig
from pretrain.errors import UsageError
from pretrain.ranks import files as rank_files
from pretrain.ranks import table as rank_table
from pretrain.ranks.table import (
    add_ranks,
    check_definition,
    merge_ranks,
    ranks_definition,
    read_ranks,
    rewind_ranks,
)
from tests.tools import assert_one_line, base_recipe, run, small_disk, write_recipe

MEASURED = RanksConfig(threshold=0.9)


def rows_of(step: int, value: float, heads: int = 3) -> list[dict[str, Any]]:
    return [
        {"step": step, "tokens": step * 8, "layer": 0, "product": product, "level": "head",
         "head": head, "pseudo_rank": value + head, "balance": None if step < 4 else 0.5,
         "singular_values": [value] * 2}
        for product in ("qk", "vp")
        for head in range(heads)
    ]  # fmt: skip


def test_merged_rows_are_the_measured_ones(tmp_path: Path) -> None:
    """In order of steps, the later of two measurements, whatever was merged when."""
    wanted = []
    for step in (2, 4, 6, 8):
        add_ranks(tmp_path, step, rows_of(step, 1.0 * step), MEASURED)
        if step == 6:
            merge_ranks(tmp_path)
            assert not (tmp_path / ".ranks").exists()
        wanted += rows_of(step, 1.0 * step)
    assert read_ranks(tmp_path) == wanted
    merge_ranks(tmp_path)
    assert read_ranks(tmp_path) == wanted
    assert pq.read_table(tmp_path / "ranks.parquet").to_pylist() == wanted
    add_ranks(tmp_path, 4, rows_of(4, 9.0), MEASURED)
    before = read_ranks(tmp_path)
    merge_ranks(tmp_path)
    key = ("step", "product", "head")
    assert sorted(read_ranks(tmp_path), key=lambda row: [row[name] for name in key]) == sorted(
        before, key=lambda row: [row[name] for name in key]
    )
    assert [row["pseudo_rank"] for row in read_ranks(tmp_path) if row["step"] == 4][:3] == [
        9.0, 10.0, 11.0,
    ]  # fmt: skip
    rewind_ranks(tmp_path, 1)
    assert read_ranks(tmp_path) == []
    add_ranks(tmp_path, 3, rows_of(3, 1.0), MEASURED)
    merge_ranks(tmp_path)
    assert read_ranks(tmp_path) == rows_of(3, 1.0)
    add_ranks(tmp_path, 2, rows_of(2, 1.0), MEASURED)
    merge_ranks(tmp_path)
    found = pq.read_table(tmp_path / "ranks.parquet").column("step").to_pylist()
    assert found == [2] * 6 + [3] * 6


def test_a_checkpoint_does_not_wait_for_a_large_table(tmp_path: Path) -> None:
    """Nothing is rewritten for a small part; what is, stays in Arrow's columns, a piece at once."""
    rows = pa.Table.from_pylist(rows_of(0, 1.0, 100))
    steps = [rows.set_column(0, "step", pa.array([step] * len(rows), pa.int64()))
             for step in range(1000)]  # fmt: skip
    pq.write_table(pa.concat_tables(steps), tmp_path / "ranks.parquet")
    stamp = (tmp_path / "ranks.parquet").stat().st_mtime_ns
    add_ranks(tmp_path, 1000, rows_of(1000, 1.0, 100), MEASURED)
    began = time.process_time()
    merge_ranks(tmp_path, always=False)
    assert time.process_time() - began < 0.1
    assert (tmp_path / "ranks.parquet").stat().st_mtime_ns == stamp
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        began = time.process_time()
        merge_ranks(tmp_path)
        assert time.process_time() - began < 1.0  # 2.3 s of one thread as objects
    finally:
        pa.set_memory_pool(usual)
    assert pool.max_memory() < 15e6  # 43 MB with all rows at once, 6 MB in pieces
    assert pq.read_metadata(tmp_path / "ranks.parquet").num_rows == 200_200


def test_the_table_states_its_definition(tmp_path: Path) -> None:
    assert ranks_definition(tmp_path) is None
    check_definition(tmp_path, MEASURED)
    add_ranks(tmp_path, 2, rows_of(2, 1.0), MEASURED)
    for _ in ("a part", "merged", "cut back"):
        assert ranks_definition(tmp_path) == {"threshold": 0.9, "denominator": "head"}
        check_definition(tmp_path, MEASURED)
        for other in (RanksConfig(threshold=0.95), RanksConfig(threshold=0.9, denominator="model")):
            with pytest.raises(UsageError, match="would mix both"):
                check_definition(tmp_path, other)
        if (tmp_path / "ranks.parquet").exists():
            rewind_ranks(tmp_path, 2)
        merge_ranks(tmp_path)
    found = pq.read_schema(tmp_path / "ranks.parquet").metadata[b"rankdecay.ranks"]
    assert json.loads(found) == {"threshold": 0.9, "denominator": "head"}


@pytest.mark.slow
def test_a_resume_does_not_mix_definitions(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of an older table, which does not say: then the run's recipe does."""
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    out = str(tmp_path / "run")
    assert run(monkeypatch, "train", str(recipe), "--out", out, "--until", "3") == 0
    for old in (False, True):
        path = tmp_path / "run/ranks.parquet"
        if old:
            pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
        for change in ("ranks.threshold=0.5", "ranks.denominator=model"):
            capsys.readouterr()
            assert run(monkeypatch, "train", str(recipe), "--out", out, change) == 2
            assert_one_line(capsys.readouterr().err, (change.split("=")[0], "would mix both"))
    assert run(monkeypatch, "train", str(recipe), "--out", out, "ranks.every=2") == 0


def test_a_full_disk_keeps_the_old_table(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "disk", "64k"):
        out = tmp_path / "disk/table.parquet"
        assert run(monkeypatch, "ranks", str(trained), "--out", str(out)) == 0
        before = out.read_bytes()
        (tmp_path / "disk/filler").write_bytes(
            b"0" * (64 * 1024 - 4096 - len(before) // 4096 * 4096 - 4096)
        )
        assert run(monkeypatch, "ranks", f"{trained}@*", "--spectra", "--out", str(out)) == 1
        assert out.read_bytes() == before
        assert sorted(one.name for one in out.parent.iterdir()) == ["filler", "table.parquet"]


@pytest.mark.parametrize("seed", range(6))
def test_a_merge_loses_nothing_and_takes_little_at_once(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps measured twice, rows that come while it writes, a rewind: as of all rows in memory."""
    rng = random.Random(seed)
    monkeypatch.setattr(rank_files, "ROWS", 3)
    wanted: dict[tuple[int, int], float] = {}

    def add(step: int) -> None:
        rows: list[dict[str, Any]] = []
        for head in range(rng.randint(1, 5)):
            value = rng.random()
            rows.append({"step": step, "layer": 0, "product": "qk", "level": "head", "head": head,
                         "pseudo_rank": value,
                         "balance": None if rng.random() < 0.5 else 1.0})  # fmt: skip
        for key in [key for key in wanted if key[0] == step]:
            del wanted[key]
        wanted.update({(step, row["head"]): row["pseudo_rank"] for row in rows})
        rank_table.add_ranks(tmp_path, step, rows, RanksConfig())

    def found() -> dict[tuple[int, int], float]:
        rows = rank_table.read_ranks(tmp_path)
        return {(row["step"], row["head"]): row["pseudo_rank"] for row in rows}

    meanwhile = rank_table._steps_of
    for turn in range(4):
        for step in range(10 * turn, 10 * turn + rng.randint(2, 8), 2):
            add(step)
        late = 10 * turn + 9

        def look(files: list[Path], until: int | None, step: int = late) -> Any:
            add(step)  # as training does, beside the merge
            return meanwhile(files, until)

        monkeypatch.setattr(rank_table, "_steps_of", look)
        rank_table.merge_ranks(tmp_path, always=turn == 3)
        monkeypatch.setattr(rank_table, "_steps_of", meanwhile)
        assert found() == wanted
        if turn == 2:
            rank_table.rewind_ranks(tmp_path, 15)
            wanted = {key: value for key, value in wanted.items() if key[0] <= 15}
            assert found() == wanted
    rank_table.merge_ranks(tmp_path)
    steps = pq.read_table(tmp_path / "ranks.parquet").column("step").to_pylist()
    assert steps == sorted(steps) and found() == wanted


def test_a_merge_leaves_few_row_groups(tmp_path: Path) -> None:
    """Thousands of measurements: a row group for each would take most of a reader's memory."""
    for step in range(40):
        add_ranks(tmp_path, step, rows_of(step, 0.5, 10), MEASURED)
    merge_ranks(tmp_path)
    metadata = pq.read_metadata(tmp_path / "ranks.parquet")
    assert (metadata.num_row_groups, metadata.num_rows) == (1, 800)
