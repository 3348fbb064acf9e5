"""Tokenisation and loading beside the limit and beside what one would use instead.

    python benchmarks/data.py --out benchmarks/results/data-cpu.json

The corpus is the text of this Python installation, repeated. By turns (A B C A B C ...):
sentencepiece alone in as many processes as cores, each with its share of the texts in memory (once
returning lists, as it is commonly called, once arrays: its limit); `pretrain data tokenize`, from
the compressed file to files and checksums on disk; `datasets.map` from a table in memory; and a
pool over lines that writes Megatron's format, as its `preprocess_data.py` does. Then the loader's
tokens a second, and the start of training data of 100 GB (a sparse file).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.results_file import finish
from data_pipeline.corpus import write_corpus
from data_pipeline.index_file import write_index
from data_pipeline.light_imports import import_light
from data_pipeline.manifest import load_manifest
from data_pipeline.prepare import train_from_sources

CORES = len(os.sched_getaffinity(0))
HUGE = 100 * 10**9
"""Bytes of the training data whose start is measured."""


def make_corpus(folder: Path, size: int) -> tuple[Path, list[bytes]]:
    """A ``.jsonl.zst`` of ``size`` bytes of text and its lines; and a tokenizer of 8,192 pieces."""
    import zstandard

    write_corpus(folder / "raw")
    packed = (folder / "raw/train.jsonl.zst").open("rb")
    lines = zstandard.ZstdDecompressor().stream_reader(packed).read().splitlines()
    total = sum(map(len, lines))
    lines *= max(1, round(size / total))
    source = folder / "source"
    source.mkdir()
    (source / "train.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(lines) + b"\n"))
    train_from_sources([str(folder / "raw")], folder / "tokenizer.model", 8192, "unigram")
    return source, lines


# --- contenders: each returns the seconds it took -------------------------------------------


def sentencepiece_alone(kind: Any, folder: Path, lines: list[bytes]) -> float:
    """Every process encodes its share; timed between two barriers."""
    context = multiprocessing.get_context("fork")
    go, done = context.Barrier(CORES + 1), context.Barrier(CORES + 1)

    def work(part: list[bytes]) -> None:
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        texts = [json.loads(line)["text"] for line in part]
        go.wait()
        for start in range(0, len(texts), 500):
            model.Encode(texts[start : start + 500], return_type=kind, num_threads=1)
        done.wait()

    parts = [lines[number::CORES] for number in range(CORES)]
    processes = [context.Process(target=work, args=(part,)) for part in parts]
    for process in processes:
        process.start()
    go.wait(60)
    began = time.monotonic()
    done.wait(600)
    seconds = time.monotonic() - began
    for process in processes:
        process.join()
    return seconds


def rankdecay(folder: Path, lines: list[bytes]) -> float:
    """The command, from the compressed file to a finished folder, its own start included."""
    out = folder / "tokens"
    shutil.rmtree(out, ignore_errors=True)
    words = [
        sys.executable, "-m", "pretrain", "data", "tokenize", str(folder / "source"),
        "--tokenizer", str(folder / "tokenizer.model"), "--out", str(out), "--workers", str(CORES),
    ]  # fmt: skip
    began = time.monotonic()
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    return time.monotonic() - began


def datasets_map(folder: Path, lines: list[bytes]) -> float:
    """`map` alone, in batches over processes; the table is in memory before."""
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    table = datasets.Dataset.from_dict({"text": [json.loads(line)["text"] for line in lines]})
    began = time.monotonic()
    encoded = table.map(
        _map_batch, batched=True, num_proc=CORES, remove_columns=["text"],
        fn_kwargs={"model": str(folder / "tokenizer.model")},
    )  # fmt: skip
    assert len(encoded) == len(lines)
    return time.monotonic() - began


_models: dict[str, Any] = {}


def _model(path: str) -> Any:
    if path not in _models:
        import sentencepiece

        _models[path] = sentencepiece.SentencePieceProcessor(model_file=path)
    return _models[path]


def _map_batch(batch: dict[str, list[str]], model: str) -> dict[str, list[list[int]]]:
    return {"ids": _model(model).Encode(batch["text"], out_type=int, num_threads=1)}


def _encode_line(item: tuple[bytes, str]) -> list[int]:
    line, model = item
    return [*_model(model).Encode(json.loads(line)["text"], out_type=int), 1]


def pool_over_lines(folder: Path, lines: list[bytes]) -> float:
    """Lines to a pool, tokens back, one document after the other into Megatron's builder."""
    import torch

    (indexed,) = import_light("megatron.core.datasets.indexed_dataset")
    out = folder / "megatron"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    began = time.monotonic()
    builder = indexed.IndexedDatasetBuilder(str(out / "train.bin"), dtype=np.uint16)
    model = str(folder / "tokenizer.model")
    with multiprocessing.get_context("fork").Pool(CORES) as pool:
        for ids in pool.imap(_encode_line, ((line, model) for line in lines), 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(str(out / "train.idx"))
    return time.monotonic() - began


CONTENDERS: dict[str, Callable[[Path, list[bytes]], float]] = {
    "sentencepiece, arrays": lambda *arguments: sentencepiece_alone("numpy", *arguments),
    "sentencepiece, lists": lambda *arguments: sentencepiece_alone(int, *arguments),
    "rankdecay": rankdecay,
    "datasets.map": datasets_map,
    "pool over lines": pool_over_lines,
}


def tokenisation(folder: Path, lines: list[bytes], turns: int) -> dict[str, Any]:
    """MB of text a second of every contender."""
    size = sum(len(json.loads(line)["text"].encode()) for line in lines)
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(turns):
        order = list(CONTENDERS.items())
        for name, work in order if turn % 2 == 0 else order[::-1]:
            rates[name].append(size / 1e6 / work(folder, lines))
    tokens = sum(entry.tokens for entry in load_manifest(folder / "tokens").entries)
    middle = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\ntokenisation, {size / 1e6:.0f} MB, {CORES} cores, {turns} turns")
    for name, rate in middle.items():
        spread = f"{min(rates[name]):.1f}-{max(rates[name]):.1f}"
        print(f"{name:22} {rate:6.1f} MB/s ({spread}), x{middle['rankdecay'] / rate:.2f}")
    return {
        "text_mb": round(size / 1e6, 1),
        "mb_per_second": {
            name: [round(value, 2) for value in values] for name, values in rates.items()
        },
        "rankdecay_tokens_per_second_per_core": round(
            middle["rankdecay"] * 1e6 * tokens / size / CORES
        ),
        "ratio": {name: round(middle["rankdecay"] / rate, 2) for name, rate in middle.items()},
    }


# --- loading --------------------------------------------------------------------------------


def loading(folder: Path, turns: int) -> dict[str, Any]:
    """Tokens a second that a data-parallel rank reads, in one thread, of batches of 8 x 256."""
    from data_pipeline.dataset import TrainingData
    from pretrain.training.loader import _stack

    manifest = load_manifest(folder / "tokens")
    rates = []
    for turn in range(turns):
        data = TrainingData(manifest, "proportional", 256, turn, 4000)
        data[0]  # the first builds the order
        began = time.monotonic()
        for start in range(0, 4000, 8):
            _stack([data[number] for number in range(start, start + 8)])
        rates.append(4000 * 256 / (time.monotonic() - began))
    rate = statistics.median(rates)
    print(f"loader: {rate:,.0f} tokens/s ({min(rates):,.0f}-{max(rates):,.0f}), one core")
    return {"tokens_per_second": [round(rate) for rate in rates]}


def write_sparse(folder: Path, size: int = HUGE, length: int = 1000) -> None:
    """A tokenised folder of ``size`` bytes that takes up its index alone.

    Args:
        length: tokens of each document.
    """
    import zlib

    from data_pipeline.checksums import BLOCK

    documents = size // 2 // length
    tokens = documents * length
    size = 2 * tokens
    (folder / "train").mkdir(parents=True)
    prefix = folder / "train/all"
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(size)
    write_index(prefix.with_suffix(".idx"), np.full(documents, length, dtype=np.int32), np.uint16)
    blocks = np.full(-(-size // BLOCK), zlib.crc32(bytes(BLOCK)), dtype="<u4")
    blocks[-1] = zlib.crc32(bytes(size % BLOCK or BLOCK))
    prefix.with_suffix(".crc").write_bytes(blocks.tobytes())
    entry = {
        "split": "train", "subset": "all", "prefix": "train/all", "documents": documents,
        "tokens": tokens, "bytes": tokens * 4,
    }  # fmt: skip
    described = {"file": "tokenizer.model", "sha256": "", "vocabulary_size": 8192, "eod": 1}
    values = {"version": 1, "tokenizer": described, "dtype": "uint16", "entries": [entry],
              "malformed": 0, "sources": [], "identity": {}}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(values))


_START = """
import sys, time
from pathlib import Path
from data_pipeline.dataset import TrainingData
from data_pipeline.indexed import index_classes
from data_pipeline.manifest import load_manifest
index_classes()
def resident(key):
    return int(open("/proc/self/status").read().split(key)[1].split()[0]) * 1024
before, began = resident("VmRSS:"), time.monotonic()
data = TrainingData(load_manifest(Path(sys.argv[1])), "proportional", 2048, 1, 1_000_000)
data[0], data[999_999]
print(time.monotonic() - began, resident("VmHWM:") - before)
"""


def huge_start(folder: Path) -> dict[str, Any]:
    """Seconds and memory from nothing to the first sample of 100 GB, in a process of its own."""
    write_sparse(folder / "huge")
    words = [sys.executable, "-c", _START, str(folder / "huge")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, peak = (float(word) for word in done.stdout.split()[-2:])
    print(f"start of 100 GB, 50 million documents: {seconds:.1f} s, {peak / 1e9:.2f} GB")
    return {"seconds": round(seconds, 2), "peak_gb": round(peak / 1e9, 3)}


def main() -> None:
    """Measure and print; JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _, lines = make_corpus(folder, options.megabytes * 10**6)
        figures = {
            "cores": CORES,
            "tokenisation": tokenisation(folder, lines, options.turns),
            "loader": loading(folder, options.turns),
            "start_of_100_gb": huge_start(folder),
        }
    finish(figures, options.out, show=False)


if __name__ == "__main__":
    main()
