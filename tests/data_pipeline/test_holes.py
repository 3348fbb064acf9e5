"""Training on tokens of a vocabulary with a hole: no id is beyond the embedding."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from data_pipeline.manifest import load_manifest
from data_pipeline.prepare import tokenize_sources
from pretrain.runs.metrics import read_metrics
from tests.conftest import write_jsonl
from tests.tokenizer_files import FILLED, byte_level
from tests.tools import base_recipe, run, write_recipe


@pytest.mark.parametrize("gap", [1, 40])
def test_a_vocabulary_with_a_hole_trains(
    gap: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest id occurs in the data, is in the model's vocabulary, and losses are finite."""
    byte_level(tmp_path / "hole.json", [text for text in FILLED for _ in range(3)])
    tree = json.loads((tmp_path / "hole.json").read_text())
    tokens = tree["model"]["vocab"]
    last = max(tokens, key=tokens.__getitem__)
    tokens[last] += gap
    (tmp_path / "hole.json").write_text(json.dumps(tree))
    text = last.replace("Ġ", " ")
    for split in ("train", "val"):
        records = [
            {"text": f"{one} {text * 30}", "meta": {"pile_set_name": "Web"}} for one in FILLED * 4
        ]
        write_jsonl(tmp_path / "in" / f"{split}.jsonl", records)
    tokenize_sources([str(tmp_path / "in")], tmp_path / "hole.json", tmp_path / "data")
    assert load_manifest(tmp_path / "data").vocabulary_size == tokens[last] + 1
    recipe = base_recipe(tmp_path / "data")
    recipe["train"]["steps"] = 3
    words = ["train", str(write_recipe(tmp_path / "recipe.yaml", recipe)), "--out"]
    assert run(monkeypatch, *words, str(tmp_path / "run")) == 0
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    losses += [row["loss"] for row in read_metrics(tmp_path / "run", "evaluation")]
    assert len(losses) >= 4 and all(math.isfinite(one) for one in losses)
