"""A tokenizer that saw held-out documents, or other text, is noticed when it is used."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.learned import remarks, write_record
from data_pipeline.prepare import parse_split, tokenize_sources, train_from_sources
from data_pipeline.records import SHARES, DataError, split_by_document
from data_pipeline.sources import find_sources

TEXTS = [f"document {number}" for number in range(1000)]
DIVISIONS = ("train", "98,1,1", "90,5,5", "90,0,10", "50,25,25", "val", None)


def records(folder: Path, name: str = "mine.jsonl", texts: list[str] = TEXTS) -> Path:
    """A file of records."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def dealt(text: str, division: str | None) -> str:
    """The split of a document, without the code under test."""
    split, shares = parse_split(division)
    return split or split_by_document(text, shares or SHARES)


@pytest.mark.parametrize(("there", "here"), product(DIVISIONS, DIVISIONS))
def test_a_remark_is_made_exactly_if_a_held_out_document_was_seen(
    there: str | None, here: str | None, tmp_path: Path
) -> None:
    path = records(tmp_path)
    sources = find_sources([str(path)])
    model = tmp_path / "some.model"
    model.write_bytes(b"a model")
    split, shares = parse_split(there)
    write_record(model, b"a model", sources, 7, split, shares or SHARES)
    sha = json.loads((tmp_path / "some.model.json").read_text())["sha256"]
    split, shares = parse_split(here)
    said = remarks(model, sha, sources, split, shares or SHARES)
    seen = any(dealt(text, there) == "train" != dealt(text, here) for text in TEXTS)
    assert bool(said) == seen
    assert all("mine.jsonl" in line and "--split" in line for line in said)
    assert remarks(model, "another", sources, split, shares or SHARES) == []


CHANGES: dict[str, dict[str, Any]] = {
    "size": {"vocabulary_size": 301},
    "type": {"kind": "unigram"},
    "amount": {"max_bytes": 1 << 20},
    "field": {"text_field": "body"},
    "split": {"split": "90,5,5"},
    "files": {"names": ["other.jsonl"]},
    "more files": {"names": ["mine.jsonl", "other.jsonl"]},
}


def test_an_existing_tokenizer_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens and runs name its hash. The same command again leaves it and says so."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine.jsonl", "other.jsonl"):
        rows = [{"text": f"{name} some words {n % 9}", "body": f"{n} bodies"} for n in range(300)]
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, record = Path("some.model"), Path("some.model.json")
    first: dict[str, Any] = {"names": ["mine.jsonl"], "vocabulary_size": 300, "split": "98,1,1"}
    assert train_from_sources(out=model, **first) == 300
    before, written = model.read_bytes(), record.read_text()
    assert train_from_sources(out=model, **first) == 300
    assert "nothing is left to do" in capsys.readouterr().err
    for changed in CHANGES.values():
        with pytest.raises(DataError, match=r"some\.model: already exists.*another --out"):
            train_from_sources(out=model, **{**first, **changed})
    for other in (b"another model", b""):  # somebody put another file there
        model.write_bytes(other)
        with pytest.raises(DataError, match="already exists"):
            train_from_sources(out=model, **first)
        assert model.read_bytes() == other and record.read_text() == written
    model.write_bytes(before)
    record.write_text("{")  # damaged, or of an earlier version
    with pytest.raises(DataError, match="already exists"):
        train_from_sources(out=model, **first)
    assert model.read_bytes() == before
    model.unlink()
    assert train_from_sources(out=model, **first) == 300


def test_from_training_to_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once, at the start, in one line, and never an error."""
    texts = [" ".join(f"{word}{number % 7}" for word in "abcdefgh" * 3) for number in range(400)]
    mine = records(tmp_path, "mine.jsonl", texts)
    other = records(tmp_path, "other.jsonl", [text[::-1] for text in texts])
    model = tmp_path / "some.model"
    train_from_sources([str(mine)], model, 280, split="98,1,1")
    record = json.loads((tmp_path / "some.model.json").read_text())
    assert record["documents"] == sum(dealt(text, "98,1,1") == "train" for text in texts)
    moved = records(tmp_path / "elsewhere", "mine.jsonl", texts)
    for source, split, words in (
        (mine, "98,1,1", None), (moved, "98,1,1", None), (moved, "train", None),
        (mine, "90,5,5", "2 % of its documents held out, and 10 %"),
        (mine, "val", "100 % are held out here"),
        (other, None, "was learned from other files"),
    ):  # fmt: skip
        capsys.readouterr()
        out = tmp_path / f"{source.parent.name}-{source.stem}-{split}"
        for _ in range(2):  # the second finds it complete
            tokenize_sources([str(source)], model, out, split=split, default_subset="mine")
        notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
        assert len(notes) == (words is not None), (split, notes)
        assert words is None or words in notes[0]
    for damage in ("", "[]", '{"sha256": 3}', json.dumps({**record, "sources": [{"name": 1}]})):
        (tmp_path / "some.model.json").write_text(damage)
        capsys.readouterr()
        out = tmp_path / f"damaged-{len(damage)}"
        tokenize_sources([str(other)], model, out, default_subset="mine")
        assert "note:" not in capsys.readouterr().err
