"""Every document of a source is used under its own subset and split, or named as left out."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.assemble import file_names
from data_pipeline.checksums import check_folder
from data_pipeline.dataset import held_out
from data_pipeline.manifest import load_manifest
from data_pipeline.prepare import tokenize_sources, train_from_sources
from data_pipeline.records import DataError, split_by_document
from data_pipeline.sources import find_sources
from data_pipeline.tokenizer import load_tokenizer
from tests.tools import assert_one_line, run

Used = Counter[tuple[str, str, str]]
"""(split, subset, text)"""


def used(folder: Path) -> Used:
    """The decoded documents of a tokenised folder."""
    manifest = load_manifest(folder)
    decode = load_tokenizer(manifest.tokenizer).decode
    return Counter(
        (split, one.subset, decode(one.tokens.tolist()))
        for split in {entry.split for entry in manifest.entries}
        for one in held_out(manifest, split)
    )


def lines(texts: list[str], subset: str = "Wiki") -> bytes:
    records = ({"text": text, "meta": {"pile_set_name": subset}} for text in texts)
    return "".join(json.dumps(one) + "\n" for one in records).encode()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# --- splits ---------------------------------------------------------------------------------

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
    train_from_sources(["test"], tmp_path / "t.model", 300, split="train")
    assert set(texts["test"]) <= set(seen)


def test_dealing_is_98_to_1_to_1() -> None:
    count = Counter(split_by_document(f"text {i}") for i in range(60_000))
    for split, share in (("train", 0.98), ("val", 0.01), ("test", 0.01)):
        error = 4 * (share * (1 - share) / 60_000) ** 0.5
        assert count[split] / 60_000 == pytest.approx(share, abs=error)


# --- subsets --------------------------------------------------------------------------------

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


# --- parquet --------------------------------------------------------------------------------

TEXTS = [f"Text {i} é" for i in range(30)]
RAW = [text.encode() for text in TEXTS]
_STRUCT = [{"pile_set_name": "Wiki"}] * 30


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
        "json": pa.array([json.dumps(_STRUCT[0])] * 30),
        "json binary": pa.array([json.dumps(_STRUCT[0]).encode()] * 30, pa.binary()),
        "json dictionary": pa.array([json.dumps(_STRUCT[0])] * 30).dictionary_encode(),
        "map": pa.array([[("pile_set_name", "Wiki")]] * 30, pa.map_(pa.string(), pa.string())),
        "binary struct": pa.array([{"pile_set_name": b"Wiki"}] * 30),
        "struct dictionary": pa.StructArray.from_arrays(
            [pa.array(["Wiki"] * 30).dictionary_encode()], ["pile_set_name"]
        ),
        "odd beside": pa.StructArray.from_arrays(
            [pa.array(["Wiki"] * 30), pa.array([10**15] * 30, pa.timestamp("ms"))],
            ["pile_set_name", "date"],
        ),
    }.get(case, pa.array(_STRUCT))
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
    pq.write_table(pa.table({"text": text, "meta": _STRUCT}), file)
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
    table = pa.table({"text": TEXTS, "meta": _STRUCT})
    pq.write_table(table, path, store_schema=False)
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    # Thrift's field of 64 bits, then the number in zigzag; the file's own count is the first.
    footer = data[start:].replace(bytes([0x16, 2 * 30]), bytes([0x16, 2 * claimed]), 1)
    path.write_bytes(data[:start] + footer)
    assert pq.ParquetFile(path).metadata.num_rows == claimed
    with pytest.raises(DataError, match=f"damaged .30 rows, but the file claims {claimed}"):
        list(find_sources([str(path)])[0].open_blocks())


# --- archives -------------------------------------------------------------------------------


def _long(data: bytes, log: int) -> bytes:
    wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=log, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    return stream.compress(data) + stream.flush()


_SKIP = b"\x5a\x2a\x4d\x18\x05\0\0\0hello"
ARCHIVES = {
    "long": lambda data: ("zst", _long(data, 29)),
    "frames": lambda data: ("zst", b"".join(zstandard.compress(data[i : i + 97])
                                            for i in range(0, len(data), 97))),
    "skippable": lambda data: ("zst", _SKIP + zstandard.compress(data) + _SKIP),
    "empty frames": lambda data: ("zst", zstandard.compress(b"") + zstandard.compress(data)
                                  + zstandard.compress(b"")),
    "upper": lambda data: ("ZST", zstandard.compress(data)),
    "members": lambda data: ("gz", gzip.compress(data[:50]) + gzip.compress(data[50:])),
    "padded": lambda data: ("gz", gzip.compress(data) + bytes(512)),
}  # fmt: skip


@pytest.mark.parametrize("case", list(ARCHIVES))
def test_forms_of_archives(tokenizer: Path, tmp_path: Path, case: str) -> None:
    suffix, packed = ARCHIVES[case](lines(TEXTS))
    file = write(tmp_path / f"train.jsonl.{suffix}", packed)
    tokenize_sources([str(file)], tokenizer, tmp_path / "out")
    assert used(tmp_path / "out") == {("train", "Wiki", text): 1 for text in TEXTS}


def test_a_window_that_needs_leave(
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The line names the window and the option; with it all documents are read."""
    file = write(tmp_path / "train.jsonl.zst", _long(lines(TEXTS), 30))
    words = ["data", "tokenize", str(file), "--tokenizer", str(tokenizer), "--out"]
    assert run(monkeypatch, *words, str(tmp_path / "no")) == 1
    assert_one_line(capsys.readouterr().err, (str(file), "1,024 MB", "--zst-window-mb 1024"))
    more = ["--zst-window-mb", "1024", "--workers", "1"]
    assert run(monkeypatch, *words, str(tmp_path / "out"), *more) == 0
    assert len(used(tmp_path / "out")) == len(TEXTS)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_every_cut_of_an_archive(tokenizer: Path, tmp_path: Path, suffix: str) -> None:
    packed = (gzip.compress if suffix == "gz" else zstandard.compress)(lines(TEXTS[:3]))
    for size in range(1, len(packed)):
        file = write(tmp_path / f"train.jsonl.{suffix}", packed[:size])
        source = find_sources([str(file)])[0]
        with pytest.raises(DataError, match="truncated or damaged") as error:
            list(source.open_blocks())
        assert str(file) in str(error.value)


def test_damage_is_one_line(
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    packed = bytearray(gzip.compress(lines(TEXTS) * 20))
    packed[len(packed) // 2 : len(packed) // 2 + 40] = b"\xff" * 40
    file, out = write(tmp_path / "train.jsonl.gz", bytes(packed)), tmp_path / "out"
    words = ["data", "tokenize", str(file), "--tokenizer", str(tokenizer), "--out", str(out)]
    assert run(monkeypatch, *words, "--workers", "1") == 1
    assert_one_line(capsys.readouterr().err, (str(file),))
    assert {one.name for one in out.iterdir()} == {".parts", ".lock"}
    # Brought again, as the line says, the same words go on.
    write(file, gzip.compress(lines(TEXTS)))
    assert run(monkeypatch, *words, "--workers", "1") == 0
    assert len(used(out)) == len(TEXTS)


# --- folders --------------------------------------------------------------------------------


def test_folders_as_other_programs_leave_them(tokenizer: Path, tmp_path: Path) -> None:
    """Links are followed, loops end, and each file that is left out is named once, and counted."""
    home, away = tmp_path / "home", tmp_path / "away"
    write(home / "a.jsonl", lines(["a"]))
    write(home / "B.JSONL", lines(["b"]))
    write(home / "deep/er/c.jsonl", lines(["c"]))
    write(home / "spark.jsonl/part-0.jsonl", lines(["spark"]))
    write(away / "d.Parquet", b"")
    pq.write_table(pa.table({"text": ["d"], "meta": _STRUCT[:1]}), away / "d.Parquet")
    write(away / "e.jsonl", lines(["e"]))
    (home / "more").symlink_to(away)
    (home / "one.jsonl").symlink_to(away / "e.jsonl")  # the same file again
    (home / "deep" / "loop").symlink_to(home)
    (away / "around").symlink_to(tmp_path / "home" / "more")
    wanted = {"a", "b", "c", "d", "e", "spark"}
    left = {
        "hidden": ("_SUCCESS", ".a.jsonl.crc", "._a.jsonl", ".DS_Store", "_temporary/0/x.jsonl",
                   "deep/.ipynb_checkpoints/c.jsonl"),
        "another kind": ("README.md", "data.csv", "x.jsonl.xz", "old.jsonl.bak"),
        "empty": ("empty.jsonl", "deep/empty.parquet", "part-1.jsonl.gz"),
    }  # fmt: skip
    for reason, names in left.items():
        for name in names:
            write(home / name, b"" if reason == "empty" else lines(["never"]))
    (home / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    os.mkfifo(home / "pipe.jsonl")
    tokenize_sources([str(home)], tokenizer, tmp_path / "out", split="train")
    assert {text for _, _, text in used(tmp_path / "out")} == wanted
    told = load_manifest(tmp_path / "out").left_out
    count = {reason: next(int(line.split(": ")[1].split()[0]) for line in told if reason in line)
             for reason in (*left, "dangling", "not a regular file", "folder above")}  # fmt: skip
    assert count == {"hidden": 6, "another kind": 4, "empty": 3, "dangling": 1,
                     "not a regular file": 1, "folder above": 2}  # fmt: skip
    assert sum("one.jsonl" in line and "same file" in line for line in told) == 1


def test_one_file_in_two_splits_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "train" / "a.jsonl", lines(["a"]))
    (tmp_path / "test").symlink_to(tmp_path / "train")
    with pytest.raises(DataError, match="once in"):
        find_sources([str(tmp_path / "train"), str(tmp_path / "test")])
    assert len(find_sources([str(file), str(tmp_path / "train"), str(file)])) == 1


def test_links_that_multiply_end(tmp_path: Path) -> None:
    for level in range(24):
        (tmp_path / str(level)).mkdir()
        for name in "ab":
            (tmp_path / str(level) / name).symlink_to(tmp_path / str(level + 1))
    write(tmp_path / "24" / "x.jsonl", lines(["x"]))
    assert len(find_sources([str(tmp_path / "0")])) == 1


@pytest.mark.parametrize("what", ["pipe", "device", "gone"])
def test_what_is_no_file(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.jsonl"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match="no such file" if what == "gone" else "not a regular"):
        find_sources([str(path)])


# --- lines ----------------------------------------------------------------------------------

_META = b'"meta": {"pile_set_name": "A"}'
_GOOD = b'{"text": "x", ' + _META + b"}"
ODD: dict[str, tuple[bytes, str]] = {
    "byte-order mark": (b"\xef\xbb\xbf" + _GOOD, ""),
    "huge number": (b'{"n": ' + b"9" * 10_000 + b', "text": "x", ' + _META + b"}", ""),
    "huge exponent": (b'{"n": 1e999999, "text": "x", ' + _META + b"}", ""),
    "NaN": (b'{"n": NaN, "m": -Infinity, "text": "x", ' + _META + b"}", ""),
    "CRLF": (_GOOD + b"\r", ""),
    "another key twice": (b'{"n": 1, "n": 2, "text": "x", ' + _META + b"}", ""),
    "surrogate in another key": (b'{"n": "\\ud800", "text": "x", ' + _META + b"}", ""),
    "blanks": (b"  " + _GOOD + b"  ", ""),
    "pair of surrogates": (b'{"text": "\\ud83d\\ude42", ' + _META + b"}", ""),
    "text twice": (b'{"text": "a", "text": "b", ' + _META + b"}", "occurs twice"),
    "meta twice": (b'{"text": "a", "meta": {"n": "B"}, ' + _META + b"}", "occurs twice"),
    "lone surrogate": (b'{"text": "\\udfff", ' + _META + b"}", "surrogate"),
    "surrogate in a name": (b'{"text": "x", "meta": {"pile_set_name": "\\ud800"}}', "surrogate"),
    "deep": (b"[" * 100_000, "deep"),
    "deep object": (b'{"a":' * 100_000, "deep"),
    "deep meta": (b'{"text": "x", "meta": "' + b"[" * 100_000 + b'"}', "no subset"),
    "array": (b"[" + _GOOD + b"]", "array"),
    "two on a line": (_GOOD + _GOOD, "not valid JSON"),
    "zeros": (bytes(50), "not valid JSON"),
    "text is a number": (b'{"text": 5, ' + _META + b"}", "no text"),
    "text is NaN": (b'{"text": NaN, ' + _META + b"}", "no text"),
    "empty": (b'{"text": "", ' + _META + b"}", "empty"),
    "no JSON": (b"hello", "not valid JSON"),
    "Latin-1": (b'{"text": "caf\xe9", ' + _META + b"}", "not valid UTF-8"),
    "UTF-16": (b"\xff\xfe" + '{"text": "x"}'.encode("utf-16-le"), "UTF-16"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(ODD))
def test_odd_lines(tokenizer: Path, tmp_path: Path, case: str) -> None:
    """Used, or named with line and reason; the lines around it are not touched."""
    line, reason = ODD[case]
    line = line.replace(b"\n", b"")
    file = write(tmp_path / "train.jsonl", b"\n".join([_GOOD, b"", line, b"\r", _GOOD]))
    report = tokenize_sources([str(file)], tokenizer, tmp_path / "out")
    count = sum(used(tmp_path / "out").values())
    assert (count, report.problems) == ((2, 1) if reason else (3, 0)), report.shown
    if reason:
        assert report.shown[0].startswith(f"{file}:3: ") and reason in report.shown[0]


# --- sources that change --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "txt", "parquet"])
def test_a_change_in_the_middle(tokenizer: Path, tmp_path: Path, suffix: str) -> None:
    """With the same size, whatever the times: it is not the source that was tokenised."""
    file, out = tmp_path / f"train.{suffix}", tmp_path / "out"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "meta": _STRUCT}), file)
    else:
        write(file, gzip.compress(lines(TEXTS)) if suffix.endswith("gz") else lines(TEXTS))
    tokenize_sources([str(file)], tokenizer, out)
    assert tokenize_sources([str(file)], tokenizer, out).already_done
    before, data = file.stat(), bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=rf"other sources \(.*train.{suffix} has changed"):
        tokenize_sources([str(file)], tokenizer, out)
    data[len(data) // 2] ^= 1
    copy = write(tmp_path / "elsewhere" / f"train.{suffix}", bytes(data))
    assert tokenize_sources([str(copy)], tokenizer, out).already_done


def test_a_change_while_it_is_read(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import tokenize as module

    file = write(tmp_path / "train.jsonl", lines(TEXTS))
    whole = module.sha256_of  # type: ignore[attr-defined]

    def changed(path: Path) -> str:
        write(file, lines(TEXTS[:-1]) + lines(["other"]))
        return whole(path)

    monkeypatch.setattr(module, "sha256_of", changed)
    with pytest.raises(DataError, match="changed while it was read"):
        tokenize_sources([str(file)], tokenizer, tmp_path / "out")
    monkeypatch.undo()
    tokenize_sources([str(file)], tokenizer, tmp_path / "out")
    assert {text for _, _, text in used(tmp_path / "out")} == {*TEXTS[:-1], "other"}


def test_a_change_of_what_an_unfinished_folder_has_read(tokenizer: Path, tmp_path: Path) -> None:
    """It is read again; the other sources are kept, and nothing is there twice."""
    first = write(tmp_path / "in" / "a.jsonl", lines(TEXTS))
    broken = write(tmp_path / "in" / "b.jsonl.gz", gzip.compress(lines(["b"]))[:-1])
    for text in ("first", "second"):
        write(first, lines([text, *TEXTS[1:]]))
        with pytest.raises(DataError, match="truncated"):
            tokenize_sources([str(tmp_path / "in")], tokenizer, tmp_path / "out", split="train")
    write(broken, gzip.compress(lines(["b"])))
    tokenize_sources([str(tmp_path / "in")], tokenizer, tmp_path / "out", split="train")
    assert used(tmp_path / "out") == Counter(
        ("train", "Wiki", text) for text in ["second", *TEXTS[1:], "b"]
    )


def test_a_folder_of_an_earlier_version(tokenizer: Path, tmp_path: Path) -> None:
    """Without hashes of files or times of sources: read, and compared by the sources' bytes."""
    file, out = write(tmp_path / "train.jsonl", lines(TEXTS)), tmp_path / "out"
    tokenize_sources([str(file)], tokenizer, out)
    values = json.loads((out / "manifest.json").read_text())
    for key in ("checksum", "files", "left_out"):
        del values[key]
    del values["identity"]["dealing"]
    values["identity"]["sources"] = [[file.stat().st_size, "a fingerprint", "train"]]
    for source in values["sources"]:
        for key in ("split", "stamp", "documents", "malformed"):
            del source[key]
    (out / "manifest.json").write_text(json.dumps(values))
    shutil.rmtree(tmp_path / "out" / ".lock", ignore_errors=True)
    assert tokenize_sources([str(file)], tokenizer, out).already_done
    assert len(used(out)) == len(TEXTS)
    assert check_folder(out, lambda done, total: None) == ([], 0)
    write(file, lines(["other", *TEXTS[1:]]))
    with pytest.raises(DataError, match="other sources"):
        tokenize_sources([str(file)], tokenizer, out)
