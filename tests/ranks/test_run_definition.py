"""Commands that measure a run again take the run's own definition of rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pretrain.ranks.table import read_ranks
from tests.tools import run, write_recipe


@pytest.mark.parametrize("denominator", ["head", "model"])
def test_ranks_and_cuts_of_a_run(
    denominator: str, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe["ranks"] |= {"threshold": 0.5, "denominator": denominator}
    recipe["model"]["position"] = "learned"
    path, out = write_recipe(tmp_path / "r.yaml", recipe), tmp_path / "run"
    assert run(monkeypatch, "train", str(path), "--out", str(out)) == 0
    own = [row for row in read_ranks(out) if row["step"] == 6]
    for more, same in (((), True), (("--threshold", "0.95"), False)):
        table = tmp_path / f"{same}.parquet"
        assert run(monkeypatch, "ranks", str(out), "--out", str(table), *more) == 0
        found = pq.read_table(table).to_pylist()
        key = ("layer", "product", "level", "head")
        theirs = {tuple(row[k] for k in key): row["pseudo_rank"] for row in found}
        differ = [row for row in own if theirs[tuple(row[k] for k in key)] != row["pseudo_rank"]]
        assert (not differ) == same
    capsys.readouterr()
    words = ("evaluate", str(out), "--documents", "3", "--attention-rank", "measured", "--json")
    assert run(monkeypatch, *words) == 0
    assert json.loads(capsys.readouterr().out)["attention_threshold"] == 0.5
