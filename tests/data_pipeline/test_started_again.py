"""A data folder begun in another way: refused by the right name, unless nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.prepare import tokenize_sources
from data_pipeline.records import DataError
from tests.conftest import write_jsonl

TEXTS = [f"a text of its own, number {number}, with some words" for number in range(60)]


def test_a_failed_start_leaves_nothing_in_the_way(tmp_path: Path, tokenizer: Path) -> None:
    write_jsonl(tmp_path / "plain.jsonl", [{"text": one} for one in TEXTS])
    source, out = [str(tmp_path / "plain.jsonl")], tmp_path / "out"
    with pytest.raises(DataError, match="--default-subset"):
        tokenize_sources(source, tokenizer, out)
    tokenize_sources(source, tokenizer, out, default_subset="notes")
    with pytest.raises(DataError, match="was made with other fields"):
        tokenize_sources(source, tokenizer, out, default_subset="more")


@pytest.mark.parametrize("first", ["named", "single"])
def test_other_sources_are_called_other_sources(
    first: str, tmp_path: Path, tokenizer: Path
) -> None:
    records = [{"text": one, "meta": {"pile_set_name": "Web"}} for one in TEXTS]
    (tmp_path / "named").mkdir()
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / "named" / f"{split}.jsonl", records)
    write_jsonl(tmp_path / "single.jsonl", records)
    sources = {"named": str(tmp_path / "named"), "single": str(tmp_path / "single.jsonl")}
    tokenize_sources([sources.pop(first)], tokenizer, tmp_path / "out")
    with pytest.raises(DataError, match="was made with other sources; choose another --out"):
        tokenize_sources([*sources.values()], tokenizer, tmp_path / "out")
