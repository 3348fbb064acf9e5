"""The commands of `pretrain data`, without their command-line interface."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from data_pipeline.corpus import write_corpus
from data_pipeline.encode import EncodingSettings
from data_pipeline.files import held, write_aside
from data_pipeline.json_tokenizer import NO_SPECIAL_TOKENS, SpecialTokens
from data_pipeline.manifest import load_manifest
from data_pipeline.pile import PILE_WEIGHTS
from data_pipeline.readers import WINDOW_MB
from data_pipeline.records import DataError, Fields, parse_block, split_by_document
from data_pipeline.sources import Source, find_sources
from data_pipeline.splits import SPLITS
from data_pipeline.tokenize import Report, tokenize
from data_pipeline.tokenizer import train_tokenizer

_EMBEDDED_VOCABULARY = 2048


def prepare_embedded(folder: Path, say: Callable[[str], None]) -> Path:
    """A corpus from this Python installation, its tokenizer and its tokens; what is there stays.

    Args:
        say: is told each part of the work before it begins.

    Returns:
        The folder of tokens.
    """
    corpus, model, data = folder / "corpus", folder / "tokenizer.model", folder / "data"
    if not (corpus / "test.jsonl.zst").exists():
        say("corpus from this Python installation")
        write_corpus(corpus)
    if not model.exists():
        say(f"tokenizer of {_EMBEDDED_VOCABULARY} pieces")
        train_from_sources([str(corpus)], model, _EMBEDDED_VOCABULARY, "bpe", 8 << 20)
    say("tokens")
    tokenize_sources([str(corpus)], model, data, workers=2)
    return data


def train_from_sources(
    names: list[str],
    out: Path,
    vocabulary_size: int,
    kind: str = "unigram",
    max_bytes: int = 256 << 20,
    text_field: str = "text",
    subset_field: str = "meta.pile_set_name",
    split: str | None = None,
    window_mb: int = WINDOW_MB,
) -> int:
    """Train a tokenizer on the training documents of some sources and write it to ``out``.

    Args:
        split: the split of every source, whatever its name.

    Returns:
        The size of the vocabulary.

    Raises:
        DataError: if the sources hold no training documents.
    """
    _check_split(split)
    sources, _ = _find(names, window_mb, split)
    held_out = [source for source in sources if (split or source.split) in ("val", "test")]
    chosen = [source for source in sources if source not in held_out]
    if not chosen:
        raise DataError(
            f"{held_out[0].name}: is held out ({split or held_out[0].split}), like all other "
            "sources; a tokenizer needs training text (--split train uses these sources as such)"
        )
    if held_out:
        _say(f"{len(held_out)} held-out source(s) not read: {held_out[0].name} …")
    fields = Fields(text_field, subset_field, "unknown")
    algorithm: Literal["unigram", "bpe"] = "bpe" if kind == "bpe" else "unigram"
    _say(
        f"tokenizer: learning {vocabulary_size:,} pieces from up to {max_bytes >> 20} MB; about a "
        "minute per 50 MB"
    )
    texts = _TrainingTexts(chosen, fields, split)
    with held(out):
        model = train_tokenizer(texts, vocabulary_size, algorithm, max_bytes)
        texts.say_problems()
        write_aside(out, model)
    return vocabulary_size


class _TrainingTexts:
    """Texts of training documents; sources without a split are divided as in tokenising."""

    def __init__(self, sources: list[Source], fields: Fields, split: str | None) -> None:
        self._sources, self._fields, self._split = sources, fields, split
        self._problems: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for source in self._sources:
            split = self._split or source.split
            for block in source.open_blocks(self._fields):
                parsed = parse_block(block, self._fields)
                self._problems += parsed.problems
                for document in parsed.documents:
                    if (split or split_by_document(document.text)) == "train":
                        yield document.text

    def say_problems(self) -> None:
        """Report malformed records, up to the end of what was read."""
        for line in self._problems[:20]:
            _say(f"skipped {line}")
        if len(self._problems) > 20:
            _say(f"skipped {len(self._problems) - 20:,} more")


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
    window_mb: int = WINDOW_MB,
    special: SpecialTokens = NO_SPECIAL_TOKENS,
    lossless: bool = False,
) -> Report:
    """Tokenise named sources, with progress on standard error."""
    _check_split(split)
    sources, left_out = _find(names, window_mb, split)
    fields = Fields(text_field, subset_field, default_subset)
    settings = EncodingSettings(tokenizer, eod_token, fields, split, strict, special, lossless)
    try:
        return tokenize(
            sources, settings, out, workers, _Meter(), tell=_say, left_out=left_out
        )  # fmt: skip
    except MemoryError:
        raise DataError(
            f"{out}: memory ran out; rerun the command with fewer --workers than {workers}, or "
            "on a larger machine: what was finished is kept"
        ) from None


def _check_split(split: str | None) -> None:
    if split not in (None, *SPLITS):
        raise DataError(f"--split: {split!r} is not train, val or test")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _find(names: list[str], window_mb: int, split: str | None) -> tuple[list[Source], list[str]]:
    """The sources, and lines about files that are left out; both are printed."""
    left_out: list[str] = []
    tell = _say if split is None else None
    sources = find_sources(names, window_mb=window_mb, tell=tell, left_out=left_out)
    for line in left_out:
        _say(line)
    if split is None:
        _say_splits(sources)
    return sources, left_out


def _say_splits(sources: list[Source]) -> None:
    """One line: which sources are a split by their names, and how many are divided."""
    parts = []
    for split in (*SPLITS, None):
        names = [source.name for source in sources if source.split == split]
        if names:
            kind = f"{split} by name" if split else "divided 98 : 1 : 1 by document"
            parts.append(f"{len(names)} {kind} ({names[0]}{' …' if len(names) > 1 else ''})")
    _say(f"sources: {', '.join(parts)}")


class _Meter:
    """Prints a line every few seconds."""

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
    """Print a table of a tokenised folder to standard output."""
    manifest = load_manifest(folder)
    if as_json:
        print((folder / "manifest.json").read_text(encoding="utf-8"))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(str(folder)))
    for column in ("split", "subset", "documents", "tokens", "bytes", "bytes/token", "share"):
        table.add_column(column, justify="left" if column in ("split", "subset") else "right")
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for entry in manifest.entries:
        for index, value in enumerate((entry.documents, entry.tokens, entry.bytes)):
            totals[entry.split][index] += value

    def row(split: str, subset: str, documents: int, tokens: int, size: int) -> None:
        table.add_row(
            split,
            escape(subset if subset.isprintable() else ascii(subset)),
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
    for line in manifest.left_out:
        print(line)
