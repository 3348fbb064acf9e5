"""``evaluation.json`` of an earlier version, or damaged: any figure may be missing or null."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.checkpoint.reader import CHECKPOINTS, Checkpoint, list_checkpoints
from pretrain.cli.models import print_evaluation
from pretrain.offline.model_card import _scores
from pretrain.runs.folder import read_evaluation
from pretrain.runs.records import shown


@pytest.mark.parametrize("lost", ["missing", "null"])
def test_a_figure_that_is_missing(
    lost: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (trained / "evaluation.json").read_text()
    checkpoint = Checkpoint(list_checkpoints(trained / CHECKPOINTS)[-1])
    (tmp_path / CHECKPOINTS).mkdir()
    checkpoint.path = tmp_path / CHECKPOINTS / checkpoint.path.name
    whole = json.loads(text)
    subset = next(iter(whole["subsets"]))
    cases: list[tuple[str, ...]] = [(key,) for key in whole if key != "overall"]
    cases += [("overall", key) for key in whole["overall"]]
    cases += [("subsets", subset, key) for key in whole["subsets"][subset]]
    for *path, key in cases:
        values = json.loads(text)
        part = values
        for name in path:
            part = part[name]
        if lost == "missing":
            del part[key]
        elif isinstance(part[key], float):
            part[key] = None
        else:
            continue
        (tmp_path / "evaluation.json").write_text(json.dumps(values))
        figures = read_evaluation(tmp_path / "evaluation.json")
        print_evaluation(figures)
        counts = ("documents", "tokens", "bytes", "loss", "perplexity", "bits_per_byte")
        if path and key in counts:
            assert "n/a" in capsys.readouterr().out, (path, key)
        card = _scores(checkpoint)
        if path and key in ("documents", "perplexity", "bits_per_byte") and card:
            assert "n/a" in "".join(card), (path, key)


def test_shown() -> None:
    row = {"a": 1234, "b": float("nan"), "c": None, "d": 0.5, "f": "5"}
    assert [shown(row, name, ",") for name in "abcef"] == ["1,234", *["n/a"] * 4]
    assert shown(row, "d", ".2f") == "0.50"
