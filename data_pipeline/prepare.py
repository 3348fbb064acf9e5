"""The verbs of `pretrain data`: what they do, without the command line."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data_pipeline.encode import Job
from data_pipeline.files import write_aside
from data_pipeline.manifest import load_manifest
from data_pipeline.pile import PILE_WEIGHTS
from data_pipeline.sources import DataError, Fields, Source, find_sources, parse_block
from data_pipeline.tokenize import Report, tokenize
from data_pipeline.tokenizer import train_tokenizer


def train_from_sources(
    names: list[str],
    out: Path,
    vocabulary_size: int,
    kind: str = "unigram",
    max_bytes: int = 256 << 20,
    text_field: str = "text",
    subset_field: str = "meta.pile_set_name",
) -> int:
    """Train a tokenizer on the training split of some sources and write it to ``out``.

    Returns:
        The size of the vocabulary.
    """
    sources = find_sources(names)
    chosen = [one for one in sources if one.split == "train"] or sources
    fields = Fields(text_field, subset_field, "unknown")
    which: Literal["unigram", "bpe"] = "bpe" if kind == "bpe" else "unigram"
    print(
        f"tokenizer: learning {vocabulary_size:,} pieces from up to {max_bytes >> 20} MB; a minute "
        "for every 50 MB or so",
        file=sys.stderr,
        flush=True,
    )
    model = train_tokenizer(_texts(chosen, fields), vocabulary_size, which, max_bytes)
    write_aside(out, model)
    return vocabulary_size


def _texts(sources: list[Source], fields: Fields) -> Iterator[str]:
    for source in sources:
        for block in source.open_blocks():
            for document in parse_block(block, fields).documents:
                yield document.text


def tokenize_sources(
    names: list[str],
    tokenizer: Path,
    out: Path,
    workers: int = 1,
    split: str | None = None,
    text_field: str = "text",
    subset_field: str = "meta.pile_set_name",
    default_subset: str | None = None,
    eod_token: str | None = None,
    strict: bool = False,
) -> Report:
    """Tokenise named sources, with progress on standard error."""
    if split not in (None, "train", "val", "test"):
        raise DataError(f"--split: {split!r} is not train, val or test")
    sources = find_sources(names)
    fields = Fields(text_field, subset_field, default_subset)
    job = Job(tokenizer, eod_token, fields, split, strict)
    return tokenize(sources, job, out, workers, _Meter())


class _Meter:
    """A line every few seconds."""

    def __init__(self) -> None:
        self._bytes = self._documents = 0
        self._began = self._shown = time.monotonic()

    def __call__(self, size: int, documents: int) -> None:
        self._bytes += size
        self._documents += documents
        now = time.monotonic()
        if now - self._shown >= 5:
            self._shown = now
            speed = self._bytes / 1e6 / (now - self._began)
            print(
                f"tokenize: {self._documents:,} documents, {self._bytes / 1e6:,.0f} MB of records, "
                f"{speed:.1f} MB/s",
                file=sys.stderr,
                flush=True,
            )


def print_info(folder: Path, as_json: bool = False) -> None:
    """A table of a tokenised folder on standard output."""
    manifest = load_manifest(folder)
    if as_json:
        print((folder / "manifest.json").read_text(encoding="utf-8"))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(folder))
    for column in ("split", "subset", "documents", "tokens", "bytes", "bytes/token", "share"):
        table.add_column(column, justify="left" if column in ("split", "subset") else "right")
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for entry in manifest.entries:
        for index, value in enumerate((entry.documents, entry.tokens, entry.bytes)):
            totals[entry.split][index] += value

    def row(split: str, subset: str, documents: int, tokens: int, size: int) -> None:
        table.add_row(
            split,
            subset,
            f"{documents:,}",
            f"{tokens:,}",
            f"{size:,}",
            f"{size / max(1, tokens):.2f}",
            f"{tokens / max(1, totals[split][1]):.1%}",
        )

    for entry in manifest.entries:
        row(entry.split, entry.subset, entry.documents, entry.tokens, entry.bytes)
    for split, (documents, tokens, size) in totals.items():
        row(split, "all", documents, tokens, size)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    present = {entry.subset for entry in manifest.entries} & set(PILE_WEIGHTS)
    print(
        f"tokenizer: {manifest.vocabulary_size:,} tokens, sha256 {manifest.tokenizer_sha256[:12]}; "
        f"tokens stored as {manifest.dtype}; {len(present)} of the Pile's 22 subsets; "
        f"{manifest.malformed} malformed records skipped"
    )
