"""Megatron pairs of others: every token is looked at, every part of the index must fit."""

from __future__ import annotations

import json
import random
import struct
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.adopt import adopt
from data_pipeline.checksums import check_folder
from data_pipeline.dataset import TrainingData, held_out
from data_pipeline.index_file import TYPES
from data_pipeline.manifest import load_manifest
from data_pipeline.pairs import read_pair
from data_pipeline.records import DataError
from tests.tokenizer_files import byte_level
from tests.tools import assert_one_line, run

CODES = {name: code for code, name in TYPES.items()}
SIZE = 300
"""Of the tokenizer's vocabulary, or a little less: largest id 299."""


def make_documents(rng: random.Random, count: int = 1000) -> list[list[int]]:
    return [[rng.randrange(2, 280) for _ in range(rng.randint(1, 20))] + [0] for _ in range(count)]


def write_pair(
    prefix: Path, documents: list[list[int]], dtype: str = "uint16", code: int | None = None
) -> None:
    lengths = np.array([len(one) for one in documents], "<i4")
    np.concatenate([np.array(one, dtype) for one in documents]).tofile(f"{prefix}.bin")
    ends = np.cumsum(lengths, dtype="<i8") * np.dtype(dtype).itemsize
    starts = np.concatenate([[0], ends[:-1]]).astype("<i8")
    write_index(prefix, lengths, starts, np.arange(len(lengths) + 1), code or CODES[dtype])


def write_index(
    prefix: Path, lengths: np.ndarray, starts: np.ndarray, bounds: np.ndarray, code: int = 8
) -> None:
    counts = (len(lengths), len(bounds))
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, *counts))
        parts = (lengths.astype("<i4"), starts.astype("<i8"), bounds.astype("<i8"))
        file.write(b"".join(part.tobytes() for part in parts))


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    byte_level(tmp_path / "plain.json")
    return tmp_path / "plain.json"


@pytest.mark.parametrize(
    ("dtype", "wrong"),
    [("uint16", 450), ("uint16", 65_535), ("int32", 2**31 - 1), ("int32", -1), ("int64", 2**40),
     ("int64", -(2**33)), ("int16", -1)],
)  # fmt: skip
def test_one_bad_token_of_many(
    dtype: str, wrong: int, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it lies, it is named with its document; chunks of any size see it."""
    rng = random.Random(f"{dtype}{wrong}")
    for chunk, place in product((64, 4 << 20), ("first", "last", "any")):
        monkeypatch.setattr("data_pipeline.pairs._CHUNK", chunk)
        documents = make_documents(rng, 200)
        number = rng.choice((0, 199, rng.randrange(200)))
        size = len(documents[number])
        documents[number][{"first": 0, "last": size - 1}.get(place, rng.randrange(size))] = wrong
        write_pair(tmp_path / "pile", documents, dtype)
        with pytest.raises(DataError, match=rf"pile\.bin: document {number} has token {wrong},"):
            adopt([tmp_path / "pile"], vocabulary, tmp_path / "out", packed=False)
        assert not (tmp_path / "out").exists()


def test_all_tokens_are_counted_and_remembered(vocabulary: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    documents = make_documents(rng)
    documents[3] = documents[3][:-1]  # without its end
    documents[5][1:1] = [0, 0]
    write_pair(tmp_path / "pile", documents)
    told = adopt([tmp_path / "pile"], vocabulary, tmp_path / "out", (90, 5, 5), packed=False)
    said = " ".join(told)
    ended = sum(one[-1] == 0 for one in documents)
    assert f"{ended} of 1000 looked at end in eod" in said
    inside = sum(one.count(0) for one in documents) - ended
    assert f"{inside} end-of-document tokens inside" in said
    assert check_folder(tmp_path / "out", lambda done, total: None) == ([], 0)
    # What was looked at is known again: a token that changes later ends the run.
    data = bytearray((tmp_path / "pile.bin").read_bytes())
    data[-4] ^= 1
    (tmp_path / "pile.bin").write_bytes(bytes(data))
    with pytest.raises(DataError, match="damaged between bytes"):
        held_out(load_manifest(tmp_path / "out"), "test")
    assert "damaged" in check_folder(tmp_path / "out", lambda done, total: None)[0][0]


def test_folders_of_earlier_versions_are_checked_as_they_are_read(
    vocabulary: Path, tmp_path: Path
) -> None:
    """Without checksums an id beyond the vocabulary still never reaches the model."""
    documents = make_documents(random.Random(1), 40)
    write_pair(tmp_path / "pile", documents)
    adopt([tmp_path / "pile"], vocabulary, tmp_path / "out", (90, 5, 5), packed=False)
    file = tmp_path / "out/manifest.json"
    values = json.loads(file.read_text())
    for entry in values["entries"]:
        del entry["checksums"]
    values.pop("checksum"), values.pop("files")
    file.write_text(json.dumps(values))
    documents[7][0] = documents[38][0] = 400
    write_pair(tmp_path / "pile", documents)
    manifest = load_manifest(tmp_path / "out")
    data = TrainingData(manifest, "proportional", 8, 1, 200)
    with pytest.raises(
        DataError, match=r"document 7 has token 400, but the vocabulary has 3\d\d tokens"
    ):
        [data[number] for number in range(200)]
    with pytest.raises(DataError, match="document 38 has token 400"):
        held_out(manifest, "test")
    larger = TrainingData(manifest, "proportional", 8, 1, 200, vocabulary_size=401)
    assert max(int(larger[number][0].max()) for number in range(200)) == 400


def test_documents_of_several_sequences_are_in_one_split(vocabulary: Path, tmp_path: Path) -> None:
    documents = make_documents(random.Random(2), 300)
    write_pair(tmp_path / "pile", documents)
    lengths = np.array([len(one) for one in documents])
    starts = np.concatenate([[0], np.cumsum(lengths[:-1]) * 2])
    write_index(tmp_path / "pile", lengths, starts, np.arange(0, 301, 3))
    told = adopt([tmp_path / "pile"], vocabulary, tmp_path / "out", (80, 10, 10), packed=False)
    assert any("100 documents of 300 sequences" in line for line in told)
    found = [(one.first, one.documents) for one in load_manifest(tmp_path / "out").entries]
    assert found == [(0, 240), (240, 30), (270, 30)]


def index_faults(lengths: np.ndarray, starts: np.ndarray) -> dict[str, tuple[Any, ...]]:
    count = len(lengths)
    bounds = np.arange(count + 1)
    moved, turned = starts.copy(), starts[::-1]
    moved[count // 2] += 2
    negative = lengths.copy()
    negative[3], negative[4] = -1, lengths[3] + lengths[4] + 1
    longer = lengths.copy()
    longer[-1] += 5
    return {
        "begins at byte": (lengths, moved, bounds),
        "sequence 0 begins at byte": (lengths, turned, bounds),
        "sequence 3 has -1 tokens": (negative, starts, bounds),
        "its index says": (longer, starts, bounds),
        "do not match its": (lengths, starts, bounds[:-1]),
        "documents do not match": (lengths, starts, bounds[::-1]),
        "do not match": (lengths, starts, np.zeros(1, dtype=np.int64)),
    }


def test_an_index_whose_parts_do_not_fit(tmp_path: Path) -> None:
    documents = make_documents(random.Random(3), 30)
    write_pair(tmp_path / "pile", documents)
    lengths = np.array([len(one) for one in documents])
    starts = np.concatenate([[0], np.cumsum(lengths[:-1]) * 2])
    for text, parts in index_faults(lengths, starts).items():
        write_index(tmp_path / "pile", *parts)
        with pytest.raises(DataError, match=text):
            read_pair(tmp_path / "pile")


@pytest.mark.parametrize("code", [0, 6, 7, 9, 255])
def test_types_that_are_no_whole_numbers(code: int, tmp_path: Path) -> None:
    write_pair(tmp_path / "pile", [[1, 2], [3]])
    content = bytearray(Path(f"{tmp_path}/pile.idx").read_bytes())
    content[17] = code
    (tmp_path / "pile.idx").write_bytes(bytes(content))
    with pytest.raises(DataError, match=rf"tokens have type {code}"):
        read_pair(tmp_path / "pile")


def test_a_giant_in_a_small_file_takes_no_memory(tmp_path: Path) -> None:
    write_pair(tmp_path / "pile", [[1, 2], [3]])
    content = bytearray((tmp_path / "pile.idx").read_bytes())
    for count in (2**40, 2**63, 2**64 - 1):
        content[18:26] = struct.pack("<Q", count)
        (tmp_path / "pile.idx").write_bytes(bytes(content))
        with pytest.raises(DataError, match="is truncated, or has no documents"):
            read_pair(tmp_path / "pile")


def fuzz(folder: Path, count: int) -> tuple[int, int]:
    """Damage indexes; returns how many were refused and how many were as they had been."""
    rng = random.Random(9)
    write_pair(folder / "pile", make_documents(rng, 12))
    index = folder / "pile.idx"
    whole = index.read_bytes()
    refused = same = 0
    for _ in range(count):
        content = bytearray(whole)
        if rng.random() < 0.2:
            content = content[: rng.randrange(len(content))]
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        index.write_bytes(bytes(content))
        try:
            found = read_pair(folder / "pile")
        except DataError:
            refused += 1
        else:
            # The bit was in what nothing depends on: a version, or another type of equal width,
            # or where one document of several sequences ends.
            assert (
                found.tokens * np.dtype(found.dtype).itemsize
                == index.with_suffix(".bin").stat().st_size
            )
            same += 1
    return refused, same


def test_damaged_indexes(tmp_path: Path) -> None:
    refused, same = fuzz(tmp_path, 150)
    assert refused > 10 * same


@pytest.mark.long
def test_damaged_indexes_long(tmp_path: Path) -> None:
    assert sum(fuzz(tmp_path, 5000)) == 5000


def test_the_one_bad_document_of_a_thousand_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`data adopt` in one line, with the first wrong id of that document."""
    byte_level(tmp_path / "plain.json")
    documents = make_documents(random.Random(4))
    documents[503][-1:] = [450, 460, 0]
    write_pair(tmp_path / "beyond", documents)
    words = ["data", "adopt", str(tmp_path / "beyond"), "--tokenizer", str(tmp_path / "plain.json")]
    assert run(monkeypatch, *words, "--out", str(tmp_path / "out")) != 0
    assert_one_line(capsys.readouterr().err, ("document 503", "token 450"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lossy", [False, True])
def test_bytes_of_a_lossy_tokenizer_are_said_to_be_of_the_decoded_text(
    lossy: bool, vocabulary: Path, tmp_path: Path
) -> None:
    if lossy:
        tree = json.loads(vocabulary.read_text())
        vocabulary.write_text(json.dumps(tree | {"normalizer": {"type": "Lowercase"}}))
    write_pair(tmp_path / "pile", make_documents(random.Random(5), 100))
    for number, shares in enumerate(((90.0, 5.0, 5.0), (100.0, 0.0, 0.0))):
        told = adopt([tmp_path / "pile"], vocabulary, tmp_path / f"out{number}", shares)
        said = any("bits per byte, are those of the decoded text" in line for line in told)
        assert said == (lossy and number == 0)
