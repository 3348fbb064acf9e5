"""A text under another key: the option finds it, and every reader says the same without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.prepare import tokenize_sources, train_from_sources
from data_pipeline.raw_documents import read_documents
from data_pipeline.records import DataError, Fields
from tests.tokenizer_files import byte_level

TEXTS = [f"document {number} of some words and {number * number}" for number in range(900)]
FORMS: dict[str, tuple[str, Callable[[str], dict[str, Any]]]] = {
    "flat": ("content", lambda text: {"content": text, "id": 1}),
    "nested": ("meta.body", lambda text: {"meta": {"body": text, "lang": "en"}}),
    "dotted": ("meta.body", lambda text: {"meta.body": text, "lang": "en"}),
    "inside JSON": ("meta.body", lambda text: {"meta": json.dumps({"body": text})}),
}
"""Records by form: the name of the field, and a record."""


def write(folder: Path, form: str, ending: str) -> Path:
    """All texts in one file of records."""
    folder.mkdir(exist_ok=True)
    path = folder / f"mine.{ending}"
    records = [FORMS[form][1](text) for text in TEXTS]
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [None, "val"])
def test_a_named_field_reads_the_same_documents(
    form: str, ending: str, split: str | None, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    usual = plain / "mine.jsonl"
    usual.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    wanted = read_documents([usual], split, None, pytest.fail)
    path = write(tmp_path, form, ending)
    found = read_documents([path], split, None, pytest.fail, Fields(FORMS[form][0]))
    assert found == wanted and found[0]


def read(path: Path, folder: Path) -> None:
    """What `evaluate` reads."""
    read_documents([path], None, None, pytest.fail)


def learn(path: Path, folder: Path) -> None:
    """What `data tokenizer` reads."""
    train_from_sources([str(path)], folder / "made.model", None)


def tokenise(path: Path, folder: Path) -> None:
    """What `data tokenize` reads."""
    made = folder / "tokenizer.json"
    byte_level(made, TEXTS[:20])
    tokenize_sources([str(path)], made, folder / "tokens", default_subset="mine")


@pytest.mark.parametrize("reader", [read, learn, tokenise])
@pytest.mark.parametrize("form", ["flat", "nested"])
def test_a_missing_field_is_the_reason(
    form: str, reader: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    """The line names the file, the field that was asked for, those that are there, and the mend."""
    path = write(tmp_path / "records", form, "jsonl")
    with pytest.raises(DataError) as caught:
        reader(path, tmp_path)
    text = str(caught.value)
    for part in (f"{path}:1:", "no text in field 'text'", repr(FORMS[form][0]), "--text-field"):
        assert part in text, (part, text)
    assert "--split" not in text and "\n" not in text


def test_a_split_without_documents_is_another_reason(tmp_path: Path) -> None:
    path = write(tmp_path, "flat", "jsonl")
    path.write_text(path.read_text().splitlines()[0])
    told: list[str] = []
    for split in ("val", "test", "train"):
        try:
            read_documents([path], split, None, told.append, Fields("content"))
        except DataError as error:
            assert f"no document of split {split}; give another --split" in str(error)
    with path.open("a") as file:
        file.write("\nnot JSON\n")
    assert read_documents([path], "all", None, told.append, Fields("content"))[0]
    assert len(told) == 1 and told[0].startswith("1 malformed record(s) skipped")
