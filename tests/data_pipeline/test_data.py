"""From raw files to Megatron pairs: formats, faults, interruptions, blends and order."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.corpus import write_corpus
from data_pipeline.dataset import TrainingData, blend_weights, held_out
from data_pipeline.encode import EncodingSettings
from data_pipeline.manifest import load_manifest
from data_pipeline.prepare import tokenize_sources, train_from_sources
from data_pipeline.sources import DataError, Fields, find_sources, parse_block
from data_pipeline.tokenize import tokenize
from data_pipeline.tokenizer import load_tokenizer
from tests.conftest import write_jsonl
from tests.sources import in_small_blocks
from tests.tools import environment, write_library

HARD = [
    "  leading spaces",
    "\ttab\n\n\nnewlines\r\nand returns",
    "😀 emoji 👩‍👩‍👧 families",
    "a literal \u2581 mark \u2581\u2581",
    "</s> <unk> <0x0A> <|endoftext|>",
    "nul \0 byte",
    "\ufeffbyte order mark, ideographic\u3000space, trailing  ",
    "ﬁ ligature ① ½ Å combining e\u0301",
    " ",
    "",
]


def documents(folder: Path, split: str = "train") -> Counter[tuple[str, str]]:
    """The decoded documents of a tokenised folder."""
    manifest = load_manifest(folder)
    decode = load_tokenizer(manifest.tokenizer).decode
    found = held_out(manifest, split)
    return Counter((one.subset, decode(one.tokens.tolist())) for one in found)


def raw_documents(folder: Path, split: str = "train") -> Counter[tuple[str, str]]:
    sources = [one for one in find_sources([str(folder)]) if one.split == split]
    parsed = [parse_block(block, Fields()) for one in sources for block in one.open_blocks()]
    return Counter((d.subset, d.text) for part in parsed for d in part.documents)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_tokenizer_keeps_every_byte(corpus: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "t.model"
    train_from_sources([str(corpus)], path, 360, kind)
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocabulary_size == 360
    texts = HARD + [text for (_, text) in raw_documents(corpus)]
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod not in ids


def test_tokens_are_the_documents(corpus: Path, data: Path) -> None:
    for split in ("train", "val", "test"):
        assert documents(data, split) == raw_documents(corpus, split)
    manifest = load_manifest(data)
    for entry in manifest.entries:
        raw = [t for (s, t), n in raw_documents(corpus, entry.split).items() for _ in range(n)
               if s == entry.subset]  # fmt: skip
        assert entry.documents == len(raw)
        assert entry.bytes == sum(len(text.encode()) for text in raw)
    assert manifest.dtype == "uint16"


def test_megatron_reads_it(data: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    manifest = load_manifest(data)
    for entry in manifest.entries:
        dataset = IndexedDataset(str(entry.prefix))
        assert len(dataset) == entry.documents
        assert sum(len(dataset[i]) for i in range(len(dataset))) == entry.tokens
        assert all(dataset[i][-1] == manifest.eod for i in range(len(dataset)))
        assert list(dataset.document_indices) == list(range(entry.documents + 1))


def test_formats_agree(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    raw = zstandard.decompress((corpus / "train.jsonl.zst").read_bytes(), 1 << 26)
    lines = [json.loads(line) for line in raw.decode().splitlines()]
    shapes = {name: tmp_path / name for name in ("plain", "gz", "frames", "parquet", "string")}
    for folder in shapes.values():
        folder.mkdir()
    (shapes["plain"] / "train.jsonl").write_bytes(raw)
    (shapes["gz"] / "train.jsonl.gz").write_bytes(gzip.compress(raw))
    half = len(raw) // 2
    frames = zstandard.compress(raw[:half]) + zstandard.compress(raw[half:])
    (shapes["frames"] / "train.jsonl.zst").write_bytes(frames)
    pq.write_table(pa.Table.from_pylist(lines), shapes["parquet"] / "train.parquet")
    strings = [{"text": one["text"], "meta": json.dumps(one["meta"])} for one in lines]
    write_jsonl(shapes["string"] / "train.jsonl", strings)
    wanted = raw_documents(corpus)
    for folder in shapes.values():
        out = folder / "out"
        tokenize_sources([str(folder)], tokenizer, out)
        assert documents(out) == wanted, folder


def test_other_fields_and_text_files(tokenizer: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"body": {"raw": "Hello."}, "where": "Web"}])
    (tmp_path / "in" / "b.txt").write_text("A whole file.\nTwo lines.")
    tokenize_sources(
        [str(tmp_path / "in")], tokenizer, tmp_path / "out", split="train",
        text_field="body.raw", subset_field="where",
    )  # fmt: skip
    assert documents(tmp_path / "out") == {
        ("Web", "Hello."): 1,
        ("in", "A whole file.\nTwo lines."): 1,
    }


def test_hugging_face_tokenizer(corpus: Path, tmp_path: Path) -> None:
    import tokenizers

    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator([text for _, text in raw_documents(corpus)], trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    tokenize_sources([str(corpus)], tmp_path / "tokenizer.json", tmp_path / "out", workers=2)
    assert documents(tmp_path / "out") == raw_documents(corpus)
    assert load_manifest(tmp_path / "out").eod == trained.token_to_id("<|endoftext|>")
    with pytest.raises(DataError, match="--eod-token"):
        load_tokenizer(tmp_path / "tokenizer.json", "<|none|>")


def test_hub_datasets_stream(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's own client, answered here: rows by split, or one line when it cannot be reached."""
    datasets = pytest.importorskip("datasets")
    rows = {
        name: [{"text": f"{name} {i}", "meta": {"pile_set_name": "Web"}} for i in range(1500)]
        for name in ("train", "validation")
    }
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: list(rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: iter(rows[split]))
    tokenize_sources(["owner/pile-copy"], tokenizer, tmp_path / "out")
    found = {entry.split: entry.documents for entry in load_manifest(tmp_path / "out").entries}
    assert found == {"train": 1500, "val": 1500}

    def unreachable(name: str) -> list[str]:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    with pytest.raises(DataError, match="owner/other: cannot reach this Hub dataset"):
        tokenize_sources(["owner/other"], tokenizer, tmp_path / "none")


def test_workers_do_not_matter(corpus: Path, tokenizer: Path, data: Path, tmp_path: Path) -> None:
    tokenize_sources([str(corpus)], tokenizer, tmp_path, workers=2)
    assert tree(tmp_path) == tree(data)


def tree(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"  # it names its last holder
    }


BAD_LINES = [
    (b"{not json", "not valid JSON"),
    (b'{"text": "x \xff", "meta": {"pile_set_name": "A"}}', "not valid UTF-8"),
    (b'{"meta": {"pile_set_name": "A"}}', "no text"),
    (b'{"text": "x"}', "no subset"),
    (b'{"text": "\\ud800", "meta": {"pile_set_name": "A"}}', "surrogate"),
    (b"[1]", "not a JSON object"),
]


def test_malformed_lines_are_named_and_skipped(tokenizer: Path, tmp_path: Path) -> None:
    good = b'{"text": "Good.", "meta": {"pile_set_name": "A"}}'
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"\n".join([good, *(line for line, _ in BAD_LINES), b"", good]))
    report = tokenize_sources([str(file)], tokenizer, tmp_path / "out")
    assert report.problems == len(BAD_LINES)
    for number, (line, (_, reason)) in enumerate(zip(report.shown, BAD_LINES, strict=True), 2):
        assert line.startswith(f"{file}:{number}: ") and reason in line
    assert documents(tmp_path / "out") == {("A", "Good."): 2}
    assert load_manifest(tmp_path / "out").malformed == len(BAD_LINES)
    with pytest.raises(DataError, match=r"train.jsonl:2: not valid JSON"):
        tokenize_sources([str(file)], tokenizer, tmp_path / "strict", strict=True)


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz", ".parquet"])
def test_truncated_archives(corpus: Path, tokenizer: Path, tmp_path: Path, suffix: str) -> None:
    raw = zstandard.decompress((corpus / "train.jsonl.zst").read_bytes(), 1 << 26)
    file = tmp_path / f"train{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([json.loads(x) for x in raw.splitlines()]), file)
    else:
        file.write_bytes((gzip.compress if suffix.endswith("gz") else zstandard.compress)(raw))
    file.write_bytes(file.read_bytes()[:-200])
    out = tmp_path / "out"
    with pytest.raises(DataError, match="truncated or damaged") as error:
        tokenize_sources([str(file)], tokenizer, out)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert not list(out.rglob("*.bin")) and not (out / "manifest.json").exists()


def test_finished_refuses_others(corpus: Path, tokenizer: Path, data: Path, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in data.rglob("*")}
    assert tokenize_sources([str(corpus)], tokenizer, data).already_done
    assert {file: file.stat().st_mtime_ns for file in data.rglob("*")} == before
    write_jsonl(tmp_path / "train.jsonl", [{"text": "x", "meta": {"pile_set_name": "A"}}])
    with pytest.raises(DataError, match="other sources"):
        tokenize_sources([str(tmp_path / "train.jsonl")], tokenizer, data)
    other = tmp_path / "other.model"
    train_from_sources([str(corpus)], other, 380, "bpe")
    with pytest.raises(DataError, match="another tokenizer"):
        tokenize_sources([str(corpus)], other, data)


SLOW = """
import sys, time
from pathlib import Path
import data_pipeline.parts as t
commit = t.Parts.commit
def slow(self, *a):
    commit(self, *a); time.sleep(0.15)
t.Parts.commit = slow
from data_pipeline.encode import EncodingSettings
from data_pipeline.tokenize import tokenize
from tests.sources import in_small_blocks
sources = in_small_blocks(Path(sys.argv[1]), 4000)
settings = EncodingSettings(Path(sys.argv[2]))
tokenize(sources, settings, Path(sys.argv[3]), part_bytes=4000)
"""


def test_killed_tokenisation_goes_on(
    corpus: Path, tokenizer: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-c", SLOW, str(corpus), str(tokenizer), str(out)]
    for kills in range(3):
        process = subprocess.Popen(words, env=environment())
        state = out / ".parts" / "state.json"
        deadline = time.monotonic() + 60
        while not (state.exists() and len(json.loads(state.read_text())["parts"]) > 2 * kills + 1):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(DataError, match="not finished"):
            load_manifest(out)
    report = tokenize(
        in_small_blocks(corpus, 4000), EncodingSettings(tokenizer), out, part_bytes=4000
    )
    assert report.resumed
    assert tree(out) == tree(data)


def test_corpus_is_deterministic(tmp_path: Path) -> None:
    library = write_library(tmp_path / "library")
    for name in ("a", "b"):
        write_corpus(tmp_path / name, library)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    (tmp_path / "b" / "val.jsonl.zst").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"val\.jsonl\.zst: already exists"):
        write_corpus(tmp_path / "b", library)
    assert (tmp_path / "b" / "val.jsonl.zst").read_bytes() == b"mine"


def a_part_of_this_python(folder: Path) -> Path:
    """A fourth of the standard library's files, and the help texts that `pydoc` shows."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [
        path for path in sorted(library.rglob("*.py"))
        if not {"site-packages", "test", "tests"}.intersection(path.parts)
    ]  # fmt: skip
    for path in [*found[::4], library / "pydoc_data/topics.py"]:
        copy = folder / path.relative_to(library)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.long)])
def test_corpus_of_this_python_is_disjoint(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        paths = {"stdlib": str(a_part_of_this_python(tmp_path / "library"))}
        fake = SimpleNamespace(get_paths=lambda: paths)
        monkeypatch.setattr("data_pipeline.corpus.sysconfig", fake)
    counts = write_corpus(tmp_path)
    assert counts["train"] > 500 and counts["test"] > 10
    texts = {split: {t for _, t in raw_documents(tmp_path, split)} for split in counts}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["val"]
    assert not texts["val"] & texts["test"]


# --- training order -------------------------------------------------------------------------


def samples(data: Path, seed: int = 1, count: int = 64, **more: Any) -> list[bytes]:
    found = TrainingData(load_manifest(data), more.get("weights", "proportional"), 32, seed, count)
    return [found[i][0].tobytes() for i in range(min(count, 64))]


def test_order_depends_on_seed_alone(data: Path) -> None:
    assert samples(data, 1) == samples(data, 1, 5000)
    assert samples(data, 1) != samples(data, 2)


def test_labels_follow_inputs(data: Path) -> None:
    found = TrainingData(load_manifest(data), "proportional", 32, 1, 10)
    for i in range(10):
        inputs, labels = found[i]
        assert len(inputs) == len(labels) == 32
        assert np.array_equal(inputs[1:], labels[:-1])


def test_epochs_cover_and_reshuffle(data: Path) -> None:
    manifest = load_manifest(data)
    entry = next(e for e in manifest.split("train") if e.subset == "ArXiv")
    weights = {"ArXiv": 1.0, "Github": 0.0, "Wikipedia (en)": 0.0}
    epoch = (entry.tokens - 1) // 32
    found = TrainingData(manifest, weights, 32, 3, 3 * epoch)
    passes = [[found[e * epoch + i][0].tobytes() for i in range(epoch)] for e in range(3)]
    assert all(len(set(part)) == epoch for part in passes)  # no sample twice in an epoch
    assert passes[0] != passes[1] != passes[2]
    tokens = [Counter(np.frombuffer(b"".join(part), np.int64).tolist()) for part in passes]
    for one in tokens[1:]:  # the same text, cut elsewhere: all but one sample's worth
        assert sum((one - tokens[0]).values()) <= 33


def test_blend_is_as_weighted(data: Path) -> None:
    manifest = load_manifest(data)
    shares = blend_weights(manifest, "proportional")
    total = sum(e.tokens for e in manifest.split("train"))
    for entry in manifest.split("train"):
        assert shares[entry.subset] == pytest.approx(entry.tokens / total)
    pile = blend_weights(manifest, "pile")
    assert pile["ArXiv"] == pytest.approx(8.96 / (8.96 + 7.59 + 1.53))
    weights = {"ArXiv": 3.0, "Github": 1.0, "Wikipedia (en)": 0.0}
    found = TrainingData(manifest, weights, 32, 1, 400)
    drawn = Counter(found._blend.place(i)[0] for i in range(400))
    assert drawn == {0: 300, 1: 100}


@pytest.mark.parametrize(
    ("weights", "culprit"),
    [
        ({"ArXiv": 1.0}, "has no weight"),
        ({"ArXiv": 1, "Github": 1, "Wikipedia (en)": 1, "Books3": 1}, "Books3"),
        ({"ArXiv": -1, "Github": 1, "Wikipedia (en)": 1}, "negative"),
        ({"ArXiv": 0, "Github": 0, "Wikipedia (en)": 0}, "not all 0"),
        ("thirds", "thirds"),
    ],
)
def test_wrong_weights(data: Path, weights: Any, culprit: str) -> None:
    with pytest.raises(DataError, match=culprit):
        blend_weights(load_manifest(data), weights)


def test_damaged_index(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    tokenize_sources([str(corpus)], tokenizer, tmp_path)
    entry = load_manifest(tmp_path).split("train")[0]
    index = Path(f"{entry.prefix}.idx")
    index.write_bytes(index.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"\.idx: the index is damaged"):
        samples(tmp_path)


@pytest.mark.parametrize(("lengths", "documents"), [(-1, -1), (0, -1)])
def test_whole_index_of_other_documents(
    corpus: Path, tokenizer: Path, tmp_path: Path, lengths: int, documents: int
) -> None:
    """An index that is whole in itself, but counts other sequences or documents than there are."""
    tokenize_sources([str(corpus)], tokenizer, tmp_path)
    entry = load_manifest(tmp_path).split("train")[0]
    index = Path(f"{entry.prefix}.idx")
    sequences, bounds = entry.documents + lengths, entry.documents + 1 + documents
    head = index.read_bytes()[:18] + struct.pack("<QQ", sequences, bounds)
    index.write_bytes(head + bytes(sequences * 12 + bounds * 8))
    with pytest.raises(DataError, match=r"\.idx: the index is damaged"):
        samples(tmp_path)
