"""Archives, folders and lines as others leave them, and sources that change."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.checksums import check_folder
from data_pipeline.manifest import load_manifest
from data_pipeline.prepare import tokenize_sources
from data_pipeline.records import DataError
from data_pipeline.sources import find_sources
from tests.sources import STRUCT, TEXTS, lines, used, write
from tests.tools import assert_one_line, run

pytestmark = pytest.mark.slow

# --- archives ------------------------------------------------------------------------------------


def _long(data: bytes, log: int) -> bytes:
    wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=log, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    return stream.compress(data) + stream.flush()


_SKIP = b"\x5a\x2a\x4d\x18\x05\0\0\0hello"

ARCHIVES: dict[str, Callable[[bytes], tuple[str, bytes]]] = {
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
    assert run(monkeypatch, *words, str(tmp_path / "no")) == 2
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


def test_damage_anywhere_in_an_archive(tmp_path: Path) -> None:
    """Every kind of error of the library: a broken header, a broken code, a wrong checksum."""
    data = lines(TEXTS)
    packed = gzip.compress(data)
    for place in range(len(packed)):
        spoilt = packed[:place] + b"\xff" * 4 + packed[place + 4 :]
        file = write(tmp_path / "train.jsonl.gz", spoilt)
        source = find_sources([str(file)])[0]
        try:
            blocks = list(source.open_blocks())
        except DataError as error:
            assert "truncated or damaged" in str(error) and str(file) in str(error)
        else:  # the date and the like
            assert [line for block in blocks for line in block.records] == data.splitlines()


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


# --- folders -------------------------------------------------------------------------------------


def test_folders_as_other_programs_leave_them(tokenizer: Path, tmp_path: Path) -> None:
    """Links are followed, loops end, and each file that is left out is named once, and counted."""
    home, away = tmp_path / "home", tmp_path / "away"
    write(home / "a.jsonl", lines(["a"]))
    write(home / "B.JSONL", lines(["b"]))
    write(home / "deep/er/c.jsonl", lines(["c"]))
    write(home / "spark.jsonl/part-0.jsonl", lines(["spark"]))
    write(away / "d.Parquet", b"")
    pq.write_table(pa.table({"text": ["d"], "meta": STRUCT[:1]}), away / "d.Parquet")
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
    (home / "itself.jsonl").symlink_to("itself.jsonl")
    (home / "folders").symlink_to("deep/../folders")
    os.mkfifo(home / "pipe.jsonl")
    tokenize_sources([str(home)], tokenizer, tmp_path / "out", split="train")
    assert {text for _, _, text in used(tmp_path / "out")} == wanted
    told = load_manifest(tmp_path / "out").left_out
    count = {reason: next(int(line.split(": ")[1].split()[0]) for line in told if reason in line)
             for reason in (*left, "dangling", "not a regular file", "folder above")}  # fmt: skip
    assert count == {"hidden": 6, "another kind": 4, "empty": 3, "dangling": 3,
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


# --- lines ---------------------------------------------------------------------------------------


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


# --- sources that change -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "txt", "parquet"])
def test_a_change_in_the_middle(tokenizer: Path, tmp_path: Path, suffix: str) -> None:
    """With the same size, whatever the times: it is not the source that was tokenised."""
    file, out = tmp_path / f"train.{suffix}", tmp_path / "out"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "meta": STRUCT}), file)
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
