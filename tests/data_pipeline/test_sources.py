"""Every document of a source is used under its own subset and split, or named as left out."""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.assemble import file_names
from data_pipeline.checksums import check_folder
from data_pipeline.prepare import tokenize_sources, train_from_sources
from data_pipeline.records import DataError, split_by_document
from data_pipeline.sources import find_sources
from tests.sources import STRUCT, TEXTS, lines, used, write

pytestmark = pytest.mark.slow

# --- splits --------------------------------------------------------------------------------------


NAMED = {
    "train": ("train", "training", "Train", "train-00000-of-00007", "00_train", "train_data",
              "train-00001-of-00002-b42a775f407cee45", "wiki-train", "wikitext-103-train"),
    "val": ("val", "valid", "validation", "dev", "VAL", "val.part3",
            "c4-validation.00001-of-00008"),
    "test": ("test", "testing", "test_set", "test2", "en.test", "wiki_test"),
    None: ("unit-test-code", "test-driven-design", "train-timetables", "contest", "latest",
           "trains", "validity", "devices", "train-test", "dev-to-articles", "my-val-notes",
           "attestation", "protest", "restraining", "00", "test_dance_music"),
}  # fmt: skip


@pytest.mark.parametrize("split", list(NAMED), ids=str)
def test_what_a_name_means(tmp_path: Path, split: str | None) -> None:
    """A file's name; inside a folder, given as a file, and as the name of a folder."""
    for name in NAMED[split]:
        home = tmp_path / name / "sources"
        file = write(home / f"{name}.jsonl", lines(["x"]))
        for given in (home, file):
            assert [one.split for one in find_sources([str(given)])] == [split], name
    for name in NAMED[split]:
        home = tmp_path / "folders" / name / "x"
        write(home / name / "00.jsonl", lines(["x"]))
        for given in (home, home / name):
            assert [one.split for one in find_sources([str(given)])] == [split], name


@pytest.mark.parametrize("name", ["train", "val", "Test", "test-00001"])
def test_a_file_given_alone_is_of_its_folder(tmp_path: Path, name: str) -> None:
    """Its folder's whole name counts, and no folder further up."""
    file = write(tmp_path / name / "00.jsonl", lines(["x"]))
    assert [one.split for one in find_sources([str(file)])] == [name.lower()[:5].rstrip("-")]
    further = write(tmp_path / name / "more" / "00.jsonl", lines(["x"]))
    assert [one.split for one in find_sources([str(further)])] == [None]


def test_the_words_of_a_split_beside_each_other(tmp_path: Path) -> None:
    """A word anywhere in a name means a split where another source has another's in its place."""
    for first, second in itertools.permutations(("train", "val", "test"), 2):
        for shape in ("unit-{}-code", "{}-clean-en", "wiki-{}", "{}/en/00", "a/{}/b/c/00"):
            files = [write(tmp_path / f"{first}{second}/{shape.format(one)}.jsonl", lines([one]))
                     for one in (first, second)]  # fmt: skip
            found = find_sources([str(file) for file in files])
            assert [one.split for one in found] == [first, second], shape
            folders = {str(file.parent) for file in files}
            for given in itertools.permutations(folders):
                named = {Path(one.name).read_bytes(): one.split for one in find_sources(given)
                         if one.name in map(str, files)}  # fmt: skip
                assert named == {lines([first]): first, lines([second]): second}, (shape, given)


@pytest.mark.parametrize("way", ["folder", "folders", "files", "inside"])
def test_splits_given_one_by_one(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """However they are given: no test text in train, nor in a tokenizer of the same sources."""
    texts = {split: [f"{split} {i} secret{split}" for i in range(300)] for split in
             ("train", "val", "test")}  # fmt: skip
    for split, found in texts.items():
        write(tmp_path / "pile" / split / "00.jsonl", lines(found))
    write(tmp_path / "pile" / "more.jsonl", lines([f"more {i}" for i in range(300)]))
    monkeypatch.chdir(tmp_path / "pile")
    given = {
        "folder": [str(tmp_path / "pile")],
        "folders": ["train", "test/", "./val", "more.jsonl"],
        "files": [*(f"../pile/{split}/00.jsonl" for split in texts), "more.jsonl"],
        "inside": ["."],
    }[way]
    tokenize_sources(given, tokenizer, tmp_path / "out")
    wanted = {(split, text) for split, found in texts.items() for text in found}
    wanted |= {(split_by_document(text := f"more {i}"), text) for i in range(300)}
    assert {(split, text) for split, _, text in used(tmp_path / "out")} == wanted
    seen: list[str] = []
    monkeypatch.setattr(
        "data_pipeline.prepare.train_tokenizer",
        lambda texts, *_: seen.extend(texts) or b"model",  # type: ignore[func-returns-value]
    )
    train_from_sources(given, tmp_path / "t.model", 300)
    assert Counter(seen) == Counter(text for split, text in wanted if split == "train")
    with pytest.raises(DataError, match="held out"):
        train_from_sources(["test", "val/00.jsonl"], tmp_path / "none.model", 300)
    train_from_sources(["test"], tmp_path / "other.model", 300, split="train")
    assert set(texts["test"]) <= set(seen)


def test_dealing_is_98_to_1_to_1() -> None:
    count = Counter(split_by_document(f"text {i}") for i in range(60_000))
    for split, share in (("train", 0.98), ("val", 0.01), ("test", 0.01)):
        error = 4 * (share * (1 - share) / 60_000) ** 0.5
        assert count[split] / 60_000 == pytest.approx(share, abs=error)


# --- subsets -------------------------------------------------------------------------------------


NAMES = [
    "Pile-CC", "Pile CC", "Pile_CC", "pile-cc", "PILE_CC", "Github", "github", "CON", "con", "nul",
    "COM1", "a" * 400, "a" * 399 + "b", "../../etc/passwd", "/etc/passwd", "..", ".", ".hidden",
    "_x", "a/b", "a\\b", "a:b", "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9"),
    "\u65e5\u672c", "x.bin", "x", "x.docs.npy", "  ", "tab\there", "line\nbreak", "[red]",
    "\x1b[31m", "*", "%00", "Pile_CC_4d5e8cd1d01c", "Pile_CC_ce3edeb3130f"
]  # fmt: skip


def test_each_subset_keeps_its_own_text(tokenizer: Path, tmp_path: Path) -> None:
    data = b"".join(lines([f"{i} {j}" for j in range(3)], name) for i, name in enumerate(NAMES))
    tokenize_sources([str(write(tmp_path / "train.jsonl", data))], tokenizer, tmp_path / "out")
    wanted = {("train", name, f"{i} {j}") for i, name in enumerate(NAMES) for j in range(3)}
    assert set(used(tmp_path / "out")) == wanted
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) == 4 * len(NAMES) + 3  # the tokenizer, the manifest, the lock
    assert check_folder(tmp_path / "out", lambda done, total: None) == ([], 0)


def test_names_of_files() -> None:
    found = file_names(NAMES)
    assert len({name.lower() for name in found.values()}) == len(NAMES)
    for subset, name in found.items():
        assert name.replace("_", "").isalnum() and name.isascii() and len(name) < 150, subset
        assert name.lower() not in ("con", "nul", "com1")
    assert file_names(["Pile-CC", "Github"]) == {"Pile-CC": "Pile_CC", "Github": "Github"}
    assert file_names(reversed(NAMES)) == found


def test_check_sees_subsets_in_one_file(tokenizer: Path, tmp_path: Path) -> None:
    """As earlier versions wrote them: two entries, the files of one."""
    data = lines(["one two"], "Pile-CC") + lines(["three"], "Github")
    out = tmp_path / "out"
    tokenize_sources([str(write(tmp_path / "train.jsonl", data))], tokenizer, out)
    values = json.loads((out / "manifest.json").read_text())
    del values["checksum"], values["files"]
    for entry in values["entries"]:
        entry["prefix"] = "train/Github"
    (out / "manifest.json").write_text(json.dumps(values))
    wrong, _ = check_folder(out, lambda done, total: None)
    assert any("'Github'" in line and "'Pile-CC'" in line for line in wrong), wrong


# --- parquet -------------------------------------------------------------------------------------


RAW = [text.encode() for text in TEXTS]


def _columns(case: str) -> dict[str, pa.Array]:
    strings = pa.array(TEXTS)
    text = {
        "binary": pa.array(RAW, pa.binary()),
        "large": pa.array(TEXTS, pa.large_string()),
        "large binary": pa.array(RAW, pa.large_binary()),
        "view": pa.array(TEXTS, pa.string_view()),
        "dictionary": strings.dictionary_encode(),
    }.get(case, strings)
    meta = {
        "json": pa.array([json.dumps(STRUCT[0])] * 30),
        "json binary": pa.array([json.dumps(STRUCT[0]).encode()] * 30, pa.binary()),
        "json dictionary": pa.array([json.dumps(STRUCT[0])] * 30).dictionary_encode(),
        "map": pa.array([[("pile_set_name", "Wiki")]] * 30, pa.map_(pa.string(), pa.string())),
        "binary struct": pa.array([{"pile_set_name": b"Wiki"}] * 30),
        "struct dictionary": pa.StructArray.from_arrays(
            [pa.array(["Wiki"] * 30).dictionary_encode()], ["pile_set_name"]
        ),
        "odd beside": pa.StructArray.from_arrays(
            [pa.array(["Wiki"] * 30), pa.array([10**15] * 30, pa.timestamp("ms"))],
            ["pile_set_name", "date"],
        ),
    }.get(case, pa.array(STRUCT))
    columns = {"text": text, "meta": meta}
    if case == "dotted":
        columns = {"text": text, "meta.pile_set_name": pa.array(["Wiki"] * 30)}
    columns |= {
        "far": {"date": pa.array([10**15] * 30, pa.timestamp("ms"))},
        "zone": {"date": pa.array([1] * 30, pa.timestamp("s", tz="Mars/Olympus"))},
        "long ago": {"date": pa.array([-(10**6)] * 30, pa.date32())},
        "bad utf8 beside": {"url": pa.array([b"\xff"] * 30, pa.binary()).view(pa.string())},
        "decimal": {"n": pa.array([1] * 30, pa.decimal128(38, 0))},
        "text beside": {"textual": strings, "text.more": strings},
    }.get(case, {})
    return columns


@pytest.mark.parametrize("case", [
    "plain", "binary", "large", "large binary", "view", "dictionary", "json", "json binary",
    "json dictionary", "map", "binary struct", "struct dictionary", "odd beside", "dotted", "far",
    "zone", "long ago", "bad utf8 beside", "decimal", "text beside",
])  # fmt: skip
@pytest.mark.parametrize("default", [None, "Other"])
def test_forms_of_parquet(tokenizer: Path, tmp_path: Path, case: str, default: str | None) -> None:
    """Whatever writer made it: all documents, under the subset that they name."""
    pq.write_table(pa.table(_columns(case)), tmp_path / "train.parquet", row_group_size=11)
    report = tokenize_sources(
        [str(tmp_path / "train.parquet")], tokenizer, tmp_path / "out", default_subset=default
    )
    assert used(tmp_path / "out") == {("train", "Wiki", text): 1 for text in TEXTS}
    assert not report.problems


@pytest.mark.parametrize("kind", ["string", "binary", "large_string", "dictionary"])
def test_bytes_that_are_no_text(tokenizer: Path, tmp_path: Path, kind: str) -> None:
    """One row is named ``file:row`` and skipped, not its neighbours; fatal with --strict."""
    raw = pa.array([b"caf\xe9" if i == 7 else x for i, x in enumerate(RAW)], pa.binary())
    text = {
        "string": lambda: raw.view(pa.string()),
        "binary": lambda: raw,
        "large_string": lambda: raw.cast(pa.large_binary()).view(pa.large_string()),
        "dictionary": lambda: pa.DictionaryArray.from_arrays(
            pa.array(range(30)), raw.view(pa.string())
        ),
    }[kind]()
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": text, "meta": STRUCT}), file)
    report = tokenize_sources([str(file)], tokenizer, tmp_path / "out")
    assert [line.split(": ", 1)[0] for line in report.shown] == [f"{file}:8"]
    assert set(used(tmp_path / "out")) == {
        ("train", "Wiki", text) for i, text in enumerate(TEXTS) if i != 7
    }
    with pytest.raises(DataError, match=r"parquet:8: not valid UTF-8"):
        tokenize_sources([str(file)], tokenizer, tmp_path / "strict", strict=True)


def test_parquet_without_the_column(tokenizer: Path, tmp_path: Path) -> None:
    """Each row is named, with the columns that are there."""
    pq.write_table(pa.table({"content": TEXTS, "id": range(30)}), tmp_path / "a.parquet")
    write(tmp_path / "b.jsonl", lines(["x"]))
    report = tokenize_sources([str(tmp_path)], tokenizer, tmp_path / "out")
    assert report.problems == 30 and "'content', 'id'" in report.shown[0]


@pytest.mark.parametrize("claimed", [29, 31, 63])
def test_parquet_that_claims_other_rows(tmp_path: Path, claimed: int) -> None:
    """Rows that its footer counts and no group holds are missing, and not passed over."""
    path = tmp_path / "train.parquet"
    table = pa.table({"text": TEXTS, "meta": STRUCT})
    pq.write_table(table, path, store_schema=False)
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    # Thrift's field of 64 bits, then the number in zigzag; the file's own count is the first.
    footer = data[start:].replace(bytes([0x16, 2 * 30]), bytes([0x16, 2 * claimed]), 1)
    path.write_bytes(data[:start] + footer)
    assert pq.ParquetFile(path).metadata.num_rows == claimed
    with pytest.raises(DataError, match=f"damaged .30 rows, but the file claims {claimed}"):
        list(find_sources([str(path)])[0].open_blocks())
