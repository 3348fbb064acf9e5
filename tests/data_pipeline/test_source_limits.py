"""What sources may cost, damage at random, workers that die, two writers of one folder."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline import readers
from data_pipeline.checksums import check_folder
from data_pipeline.encode import EncodingSettings
from data_pipeline.files import locked
from data_pipeline.manifest import load_manifest
from data_pipeline.prepare import tokenize_sources
from data_pipeline.readers import _gz_chunks
from data_pipeline.records import DataError, Unreadable
from data_pipeline.tokenize import tokenize
from tests.source_fuzz import one_case
from tests.sources import TEXTS, in_small_blocks, lines, used, write
from tests.tools import assert_one_line, environment, run


def test_damage_at_random(tokenizer: Path, tmp_path: Path) -> None:
    """A sample of the trial below; its seeds are others."""
    found = Counter(one_case(seed, tokenizer, tmp_path / str(seed)) for seed in range(150))
    assert min(found["counted"], found["refused"]) > 30


@pytest.mark.long
@pytest.mark.parametrize("part", range(8))
def test_damage_at_random_at_length(tokenizer: Path, tmp_path: Path, part: int) -> None:
    """Eight thousand damaged sources: counted as another reader counts them, or refused."""
    start = 1000 * (part + 1)
    for seed in range(start, start + 1000):
        one_case(seed, tokenizer, tmp_path / str(seed))


# --- time and memory ------------------------------------------------------------------------


def test_a_long_line_takes_linear_time() -> None:
    """Sixteen times the line, not 256 times the time (as it was: 43 s for 256 MB)."""

    def seconds(megabytes: int) -> float:
        began = time.process_time()
        (line,) = readers.split_lines(iter([b"x" * (1 << 16)] * (16 * megabytes)))
        assert isinstance(line, bytes) and len(line) == megabytes << 20
        return time.process_time() - began

    seconds(8)
    assert min(seconds(128) for _ in range(3)) < 100 * max(0.005, min(seconds(8) for _ in range(3)))


@pytest.mark.parametrize("size", [0, 1, 7, 64])
def test_lines_however_they_are_cut(size: int) -> None:
    data = b"\nab\n\n" + b"c" * 100 + b"\nd\r\ne"
    cut = [data[i : i + size] for i in range(0, len(data), size)] if size else [data]
    assert list(readers.split_lines(iter(cut))) == data.split(b"\n")


def test_lines_beyond_the_limit() -> None:
    """Too long is too long by one byte; the lines around it are there, in their places."""
    data = b"ok\n" + b"x" * 10 + b"\n" + b"y" * 11 + b"\n" + b"z" * 500 + b"\nend"
    for size in (1, 3, 1000):
        cut = (data[i : i + size] for i in range(0, len(data), size))
        found = list(readers.split_lines(cut, most=10))
        assert [isinstance(one, Unreadable) for one in found] == [False, False, True, True, False]
        assert found[0] == b"ok" and found[1] == b"x" * 10 and found[4] == b"end"


def _zst_of(size: int, piece: bytes) -> bytes:
    packer = zstandard.ZstdCompressor(level=3).compressobj()
    piece *= (1 << 20) // len(piece)
    return b"".join(packer.compress(piece) for _ in range(size >> 20)) + packer.flush()


def _bomb(case: str, path: Path) -> Path:
    if case == "zst of one line":
        return write(path / "a.jsonl.zst", _zst_of(1 << 30, b"a"))
    if case == "zst of blank lines":
        return write(path / "a.jsonl.zst", _zst_of(8 << 20, b"\n"))
    if case == "text":
        with (path / "a.txt").open("wb") as file:
            file.truncate(8 << 30)  # a hole: nothing is on the disk
        return path / "a.txt"
    if case == "line":
        with (path / "a.jsonl").open("wb") as file:
            file.truncate(2 << 30)
        return path / "a.jsonl"
    _write_bomb(case, path / "a.parquet")
    return path / "a.parquet"


def _write_bomb(case: str, path: Path) -> None:
    """1,050 rows with a string of 3 MB in each, which stands in the file once, or packs well."""
    value, rows = "x" * 3_000_000, 1050
    if "JSON" in case:
        value = json.dumps({"n": value})
    same = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    few = pa.array(["x"] * rows)
    wiki = pa.array([{"pile_set_name": "A"}] * rows)
    table = pa.table(
        {"text": few, "meta": same} if "JSON" in case else {"text": same, "meta": wiki}
    )
    dictionary = "dictionary" in case
    with pq.ParquetWriter(
        path, table.schema, compression="zstd", use_dictionary=dictionary, store_schema=False,
        dictionary_pagesize_limit=1 << 30,
    ) as writer:  # fmt: skip
        if dictionary:
            writer.write_table(table)
        else:
            for start in range(0, rows, 10):
                writer.write_table(table.slice(start, 10), row_group_size=rows)


READ = """
import re, sys
from pathlib import Path
from data_pipeline.sources import find_sources
from data_pipeline.records import Fields, parse_block
good = bad = 0
for source in find_sources([sys.argv[1]]):
    for block in source.open_blocks():
        parsed = parse_block(block, Fields())
        good, bad = good + len(parsed.documents), bad + len(parsed.problems)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(good, bad, int(peak) >> 10)
"""
BOMBS = {
    "zst of one line": (0, 1), "zst of blank lines": (0, 0), "text": (0, 1), "line": (0, 1),
    "parquet with a dictionary": (1050, 0), "parquet with JSON in a dictionary": (0, 1050),
    "parquet of pages": (1050, 0),
}  # fmt: skip
LIMITS = {"parquet with a dictionary": 400}
"""MB, where less than 1,000; 116 MB are taken, 724 if the rows were unpacked at once."""


@pytest.mark.parametrize("case", [
    "zst of one line", "parquet with a dictionary", "text",
    *(pytest.param(case, marks=pytest.mark.long) for case in
      ("zst of blank lines", "line", "parquet with JSON in a dictionary", "parquet of pages")),
])  # fmt: skip
def test_bombs_in_bounded_memory(tmp_path: Path, case: str) -> None:
    """Read in under 1 GB whatever it unpacks to: every record is used, or named as too long."""
    file = _bomb(case, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(file)], env=environment(), capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    good, bad, peak = (int(word) for word in done.stdout.split())
    assert (good, bad) == BOMBS[case]
    assert peak < LIMITS.get(case, 1000)


def test_memory_that_runs_out_is_one_line(
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def none_left(*_: object) -> None:
        raise MemoryError

    file = write(tmp_path / "train.jsonl", lines(TEXTS))
    monkeypatch.setattr("data_pipeline.encode.parse_block", none_left)
    words = ["data", "tokenize", str(file), "--tokenizer", str(tokenizer), "--out", "out"]
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words, "--workers", "1") == 1
    assert_one_line(capsys.readouterr().err, ("out: memory ran out", "--workers"))


# --- workers and writers --------------------------------------------------------------------


def test_a_worker_that_is_killed(tokenizer: Path, tmp_path: Path) -> None:
    """As the system does when memory runs out: one line, and the same words go on."""
    sources = in_small_blocks(write(tmp_path / "train.jsonl", lines(TEXTS * 40)), 200)

    others = set(multiprocessing.active_children())  # of earlier tests

    def kill(size: int, documents: int) -> None:
        for child in list(set(multiprocessing.active_children()) - others)[:1]:
            os.kill(child.pid or 0, signal.SIGKILL)

    with pytest.raises(DataError, match=r"a worker process was killed.*fewer than 2 --workers"):
        tokenize(sources, EncodingSettings(tokenizer), tmp_path / "out", 2, kill, part_bytes=300)
    assert not set(multiprocessing.active_children()) - others
    report = tokenize(sources, EncodingSettings(tokenizer), tmp_path / "out")
    assert report.resumed
    assert used(tmp_path / "out") == {("train", "Wiki", text): 40 for text in TEXTS}


def test_two_writers_of_one_folder(
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second ends with a line that names the first, and the folder is the first's."""
    out = tmp_path / "out"
    words = [
        [sys.executable, "-m", "pretrain", "data", "tokenize",
         str(write(tmp_path / f"{i}" / "train.jsonl", lines([f"{i} {text}" for text in TEXTS]))),
         "--tokenizer", str(tokenizer), "--out", str(out), "--workers", "1"]
        for i in range(2)
    ]  # fmt: skip
    with locked(out):
        assert run(monkeypatch, *words[0][3:]) == 1
        assert_one_line(capsys.readouterr().err, (str(out), f"pid {os.getpid()}"))
    both = [subprocess.Popen(one, env=environment(), stderr=subprocess.PIPE, text=True,
                             stdout=subprocess.DEVNULL) for one in words]  # fmt: skip
    errors = [one.communicate(timeout=120)[1] for one in both]
    codes = [one.returncode for one in both]
    winner = codes.index(0)
    loser = 1 - winner
    assert codes[loser] in (1, 2), errors  # the other one writes, or has written
    assert_one_line(errors[loser], (str(out),))
    assert {text for _, _, text in used(out)} == {f"{winner} {text}" for text in TEXTS}
    assert check_folder(out, lambda done, total: None) == ([], 0)


@pytest.mark.parametrize("name", [
    "train/Github.bin", "val/x", "test/notes.txt", "tokenizer.model", ".parts/mine",
    ".parts/mine/notes.txt", "manifest.json",
])  # fmt: skip
def test_what_lies_in_the_folder_stays(tokenizer: Path, tmp_path: Path, name: str) -> None:
    """Files of others are not overwritten nor deleted: one line names the first."""
    source, out = write(tmp_path / "train.jsonl", lines(["x"])), tmp_path / "out"
    mine = write(out / name, b"{}" if name == "manifest.json" else b"mine")
    before, first = mine.read_bytes(), Path(name).parts[0]
    with pytest.raises(DataError, match=rf"{first}.*(not made by this command|not a manifest)"):
        tokenize_sources([str(source)], tokenizer, out)
    assert mine.read_bytes() == before
    assert {one.name for one in out.iterdir()} <= {first, ".parts", ".lock"}


def test_other_files_beside_the_tokens_do_not_matter(tokenizer: Path, tmp_path: Path) -> None:
    source, out = write(tmp_path / "train.jsonl", lines(["x"])), tmp_path / "out"
    write(out / "notes.txt", b"mine")
    write(out / "tokenizer.model", tokenizer.read_bytes())
    tokenize_sources([str(source)], out / "tokenizer.model", out)
    assert (out / "notes.txt").read_bytes() == b"mine" and len(used(out)) == 1


def test_a_kill_while_the_state_is_written(tokenizer: Path, tmp_path: Path) -> None:
    """What it leaves is known for ours, and goes."""
    packed = gzip.compress(lines(TEXTS))
    file = write(tmp_path / "train.jsonl.gz", packed[:-1])
    with pytest.raises(DataError, match="truncated"):
        tokenize_sources([str(file)], tokenizer, tmp_path / "out")
    write(tmp_path / "out" / ".parts" / ".state.json.0123456789ab.tmp", b"{")
    write(tmp_path / "out" / ".parts" / "whole" / "x.bin", b"half")
    write(file, packed)
    tokenize_sources([str(file)], tokenizer, tmp_path / "out")
    assert len(used(tmp_path / "out")) == len(TEXTS)
    assert not (tmp_path / "out" / ".parts").exists()


# --- giants of others -----------------------------------------------------------------------


def test_counts_that_no_memory_holds(tokenizer: Path, tmp_path: Path) -> None:
    """An index of 2^40 documents, a list of them of 2^40 rows, a device in a file's place."""
    from data_pipeline.dataset import held_out
    from data_pipeline.pairs import read_pair

    source, out = write(tmp_path / "val.jsonl", lines(TEXTS)), tmp_path / "out"
    tokenize_sources([str(source)], tokenizer, out)
    values = json.loads((out / "manifest.json").read_text())
    del values["checksum"], values["files"]  # an earlier version's, or a stranger's
    (out / "manifest.json").write_text(json.dumps(values))
    index, documents = out / "val" / "Wiki.idx", out / "val" / "Wiki.docs.npy"
    whole = index.read_bytes()
    write(index, whole[:18] + struct.pack("<QQ", 1 << 40, (1 << 40) + 1) + whole[34:])
    with pytest.raises(DataError, match=r"Wiki\.idx: "):
        read_pair(out / "val" / "Wiki")
    with pytest.raises(DataError, match=r"Wiki\.idx: the index is damaged"):
        held_out(load_manifest(out), "val")
    write(index, whole)
    huge = np.lib.format.header_data_from_array_1_0(np.load(documents))
    with documents.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, huge | {"shape": (1 << 40,)})
    for kind in ("header", "device", "pipe"):
        if kind != "header":
            documents.unlink()
        if kind == "device":
            documents.symlink_to("/dev/zero")
        if kind == "pipe":
            os.mkfifo(documents)
        with pytest.raises(DataError, match=r"Wiki\.docs\.npy: missing or damaged"):
            held_out(load_manifest(out), "val")
        assert "Wiki.docs.npy" in check_folder(out, lambda done, total: None)[0][0]


# --- every file has its hash ----------------------------------------------------------------


def test_every_bit_of_a_folder(tokenizer: Path, tmp_path: Path) -> None:
    """One flipped bit in any file: `data check` names the file, and so does whoever reads it."""
    from data_pipeline.dataset import TrainingData, held_out

    data = lines(TEXTS * 4) + lines(TEXTS, "Web")
    out = tmp_path / "out"
    for split in ("train", "val"):
        write(tmp_path / "in" / f"{split}.jsonl", data)
    tokenize_sources([str(tmp_path / "in")], tokenizer, out)
    files = [one for one in sorted(out.rglob("*")) if one.is_file() and one.name != ".lock"]
    assert len(files) == 2 * 2 * 4 + 2

    def read() -> None:
        manifest = load_manifest(out)
        held_out(manifest, "val")
        training = TrainingData(manifest, "proportional", 8, 1, 400)
        for i in range(400):
            training[i]

    read()
    for file in files:
        whole = file.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            broken = bytearray(whole)
            broken[place] ^= 4
            file.write_bytes(bytes(broken))
            try:
                wrong = check_folder(out, lambda done, total: None)[0]
            except DataError as error:
                wrong = [str(error)]
            assert any(str(file) in line for line in wrong), (file, place)
            read_by_training = file.name != "tokenizer.model" and not (
                file.parent.name == "train" and file.name.endswith(".docs.npy")
            )
            if read_by_training:
                with pytest.raises(DataError) as raised:
                    read()
                assert file.stem.split(".")[0] in str(raised.value)
        file.write_bytes(whole)
    assert check_folder(out, lambda done, total: None) == ([], 0)
    files[-1].unlink()
    assert "missing" in check_folder(out, lambda done, total: None)[0][0]


@pytest.mark.parametrize(
    "seed", [*range(12), *(pytest.param(n, marks=pytest.mark.long) for n in range(12, 40))]
)
def test_members_of_an_archive(seed: int, tmp_path: Path) -> None:
    """As Python's gzip reads them: members, padding, cuts and bytes behind; flips are damage."""
    rng = random.Random(seed)
    path = tmp_path / "x.jsonl.gz"
    for _ in range(20):
        parts = []
        for _ in range(rng.randint(1, 4)):
            text = rng.randbytes(rng.choice([0, 1, 5, 1000])) * rng.choice([1, 1, 3, 4000])
            parts.append(
                gzip.compress(text, rng.choice([0, 1, 9])) + bytes(rng.choice([0, 1, 700]))
            )
        raw = b"".join(parts)
        act = rng.random()
        if act < 0.3:
            raw = raw[: rng.randrange(1, len(raw))]
        elif act < 0.5:
            raw += rng.randbytes(rng.randint(1, 9))
        path.write_bytes(raw)
        try:
            with gzip.open(path) as file:
                wanted = file.read()
        except (EOFError, gzip.BadGzipFile, zlib.error):
            with pytest.raises((EOFError, zlib.error)):
                list(_gz_chunks(path))
        else:
            found = list(_gz_chunks(path))
            assert b"".join(found) == wanted and all(0 < len(part) <= 1 << 20 for part in found)


def test_padding_of_an_archive_takes_no_time(tmp_path: Path) -> None:
    """A file that was allocated in advance: 256 MB of holes behind its one member."""
    path = tmp_path / "x.jsonl.gz"
    with path.open("wb") as file:
        file.write(gzip.compress(b"hello"))
        file.truncate(1 << 28)
    began = time.process_time()
    assert b"".join(_gz_chunks(path)) == b"hello"
    assert time.process_time() - began < 5  # byte by byte: minutes
