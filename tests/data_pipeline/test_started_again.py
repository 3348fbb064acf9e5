"""A data folder begun in another way: refused by the right name, unless nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.manifest import load_manifest
from data_pipeline.prepare import tokenize_sources, train_from_sources
from data_pipeline.records import DataError
from data_pipeline.tokenizer import load_tokenizer
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


def test_an_attempt_that_failed_may_be_followed_by_another(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A later source stops it, after an earlier one was saved."""
    good = [{"text": one, "meta": {"pile_set_name": "Web"}} for one in TEXTS]
    write_jsonl(tmp_path / "a.jsonl", good)
    write_jsonl(tmp_path / "b.jsonl", [{"text": one} for one in TEXTS])
    source, out = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")], tmp_path / "out"
    with pytest.raises(DataError, match="no subset"):
        tokenize_sources(source, tokenizer, out, strict=True)
    made = tokenize_sources(source, tokenizer, out, default_subset="notes", strict=True)
    assert "was started with other fields, and failed" in capsys.readouterr().err
    assert sum(entry["documents"] for entry in made.manifest["entries"]) == 2 * len(TEXTS)


def test_one_file_is_divided_if_asked(tmp_path: Path, tokenizer: Path) -> None:
    """A train.jsonl alone has no held-out documents; --split takes them from it."""
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"{one} {n}"} for one in TEXTS for n in "abc"])
    source = [str(tmp_path / "train.jsonl")]
    tokenize_sources(source, tokenizer, tmp_path / "whole", default_subset="x")
    with pytest.raises(DataError, match=r"no split 'val'; it has train.*--split 98,1,1"):
        load_manifest(tmp_path / "whole").split("val")
    with pytest.raises(DataError, match="made with another division into splits"):
        tokenize_sources(source, tokenizer, tmp_path / "whole", 1, "98,1,1", default_subset="x")
    counts = {}
    for shares in ("80,15,5", "80,5,15"):
        out = tmp_path / shares
        tokenize_sources(source, tokenizer, out, 1, shares, default_subset="x")
        entries = load_manifest(out).entries
        counts[shares] = {entry.split: entry.documents for entry in entries}
        assert sum(counts[shares].values()) == 3 * len(TEXTS)
        assert set(counts[shares]) == {"train", "val", "test"}
        train_from_sources(source, tmp_path / "t.model", None, split=shares)
    assert counts["80,15,5"]["val"] > counts["80,15,5"]["test"]
    assert counts["80,5,15"]["val"] < counts["80,5,15"]["test"]
    assert counts["80,15,5"]["train"] == counts["80,5,15"]["train"]
    for wrong in ("98,1", "0,50,50", "98,1,2", "a,b,c", "train,1,1", ""):
        with pytest.raises(DataError, match="--split"):
            tokenize_sources(source, tokenizer, tmp_path / "no", 1, wrong)


def test_the_size_of_a_vocabulary_suits_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "some.jsonl", [{"text": one} for one in TEXTS])
    source, out = [str(tmp_path / "some.jsonl")], tmp_path / "t.model"
    size = train_from_sources(source, out, None)
    assert 260 < size < 512 and f"has only {size} pieces" in capsys.readouterr().err
    assert load_tokenizer(out).vocabulary_size == size
    with pytest.raises(DataError, match="too high"):
        train_from_sources(source, tmp_path / "large.model", 8192)
