"""Damage to sources, and an accounting of it by other readers than the product's.

For a damaged source, one of two things is right: an error of one line that names the file, or every
record of the file either used or counted as malformed, as another reader counts them.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_pipeline.manifest import load_manifest
from data_pipeline.prepare import tokenize_sources
from data_pipeline.records import DataError

DOCUMENTS = 40
FORMATS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")


def _records(rng: random.Random) -> list[dict[str, Any]]:
    words = ["rank", "decay", "é", "🙂", "naïve", "\u2028", "query", "key"]
    return [
        {
            "text": f"Document {i} " + " ".join(rng.choices(words, k=rng.randint(3, 30))),
            "meta": {"pile_set_name": rng.choice(("Wiki", "Web"))},
        }
        for i in range(DOCUMENTS)
    ]


def whole_file(form: str, rng: random.Random) -> bytes:
    """A source of one format, as a writer of it would make it."""
    records = _records(rng)
    lines = "".join(json.dumps(r, ensure_ascii=rng.random() < 0.5) + "\n" for r in records).encode()
    if form == ".txt":
        text: bytes = records[0]["text"].encode()
        return text
    if form == ".jsonl.gz":
        half = rng.randrange(len(lines))
        return gzip.compress(lines[:half]) + gzip.compress(lines[half:])
    if form == ".jsonl.zst":
        half = rng.randrange(len(lines))
        made = zstandard.ZstdCompressor(write_checksum=True, write_content_size=rng.random() < 0.5)
        skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd" if rng.random() < 0.3 else b""
        return made.compress(lines[:half]) + skipped + made.compress(lines[half:])
    if form == ".parquet":
        sink = io.BytesIO()
        pq.write_table(
            pa.Table.from_pylist(records), sink, row_group_size=rng.choice((7, 1000)),
            compression=rng.choice(("snappy", "zstd", "none")),
            use_dictionary=rng.random() < 0.5, write_page_checksum=rng.random() < 0.5,
        )  # fmt: skip
        return sink.getvalue()
    return lines


def _flip(data: bytes, rng: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 40))):
        made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    return bytes(made)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _cut_out(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randint(1, 50) :]


def _hole(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    size = rng.randint(1, min(200, len(data) - start))
    return data[:start] + bytes(size) + data[start + size :]


def _put_in(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.randint(1, 50)) + data[start:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    part = data[start : start + rng.randint(1, 300)]
    return data[:start] + part + data[start:]


def _join(data: bytes, rng: random.Random) -> bytes:
    return data + whole_file(rng.choice(FORMATS), rng)


def _twice(data: bytes, rng: random.Random) -> bytes:
    return data + data


def _marked(data: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\n", b"\r\n")) + data


def _as_it_is(data: bytes, rng: random.Random) -> bytes:
    return data


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip, _flip, _cut, _cut_out, _hole, _put_in, _repeat, _join, _twice, _marked, _as_it_is,
)  # fmt: skip


def one_case(seed: int, tokenizer: Path, folder: Path) -> str:
    """Damage a source, tokenise it, and hold the result against the other readers.

    Returns:
        ``counted`` or ``refused``.

    Raises:
        AssertionError: if a record is lost without a word, or an error is not one of ours.
    """
    rng = random.Random(seed)
    form = rng.choice(FORMATS)
    whole = whole_file(form, rng)
    data = rng.choice(DAMAGES)(whole, rng)
    if rng.random() < 0.1:
        form = rng.choice(FORMATS)  # renamed
    folder.mkdir(parents=True)
    file = folder / f"a{form.upper() if rng.random() < 0.2 else form}"
    file.write_bytes(data)
    given = folder if rng.random() < 0.5 else file
    expected = _count(form, data)
    out = folder.parent / f"{folder.name}-out"
    try:
        report = tokenize_sources([str(given)], tokenizer, out, split="train")
    except DataError as error:
        assert "\n" not in str(error) and str(folder) in str(error), error
        assert not list(out.rglob("*.bin")) and not (out / "manifest.json").exists()
        # Of parquet the readers look at different parts of the damage.
        harmed = form == ".parquet" and data != whole
        assert harmed or expected is None or expected[0] == 0, (seed, str(error))
        return "refused"
    assert expected is not None, (seed, "what another reader refuses was taken")
    used = sum(entry.documents for entry in load_manifest(out).entries)
    assert (used, report.problems) == expected, (seed, used, report.problems, expected)
    return "counted"


def _count(form: str, data: bytes) -> tuple[int, int] | None:
    """(good, malformed) records, or None for a file that cannot be read."""
    if form == ".txt":
        return (1, 0) if data and _is_text(data) else (0, 1)
    if form == ".parquet":
        return _count_rows(data)
    lines: bytes | None = data
    if form == ".jsonl.gz":
        lines = _gunzip(data)
    if form == ".jsonl.zst":
        lines = _unzstd(data)
    if lines is None:
        return None
    found = [line for line in lines.split(b"\n") if line.strip()]
    good = sum(map(_is_record, found))
    return good, len(found) - good


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_record(line: bytes) -> bool:
    try:
        pairs = json.loads(line.removeprefix(b"\xef\xbb\xbf"), object_pairs_hook=list)
        values = dict(pairs)
        subset = dict(values["meta"])["pile_set_name"]
        text = values["text"]
        (text + subset).encode()
        return bool(isinstance(text, str) and isinstance(subset, str) and text and subset)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _gunzip(data: bytes) -> bytes | None:
    """Every member by zlib itself; zeros may follow the last."""
    found = b""
    while data:
        member = zlib.decompressobj(31)
        try:
            found += member.decompress(data)
        except zlib.error:
            return None
        if not member.eof:
            return None
        data = member.unused_data.lstrip(b"\0")
    return found


def _unzstd(data: bytes) -> bytes | None:
    """Every frame by the one-shot interface, which knows where a frame ends."""
    found = b""
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            found += frame.decompress(data)
        except zstandard.ZstdError:
            return None
        if not frame.eof:
            return None
        data = frame.unused_data
    return found


def _count_rows(data: bytes) -> tuple[int, int] | None:
    """Rows by whole columns, each value looked at by itself."""
    try:
        table = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read(
            columns=["text", "meta.pile_set_name"]
        )
        if "text" not in table.column_names:
            return 0, table.num_rows
        good = sum(_is_row(table, i) for i in range(table.num_rows))
        return good, table.num_rows - good
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError):
        return None


def _is_row(table: pa.Table, row: int) -> bool:
    try:
        text = table["text"][row].as_py()
        subset = table["meta"][row].as_py()["pile_set_name"]
    except (UnicodeDecodeError, LookupError, TypeError):
        return False
    return bool(isinstance(text, str) and isinstance(subset, str) and text and subset)
