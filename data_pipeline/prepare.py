"""The commands of `pretrain data`, without their command-line interface."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from data_pipeline.corpus import write_corpus
from data_pipeline.encode import EncodingSettings
from data_pipeline.files import held, write_aside
from data_pipeline.json_tokenizer import NO_SPECIAL_TOKENS, SpecialTokens
from data_pipeline.learned import is_made, remarks, write_record
from data_pipeline.manifest import MANIFEST, load_manifest
from data_pipeline.pile import PILE_WEIGHTS
from data_pipeline.readers import WINDOW_MB
from data_pipeline.records import (
    SHARES,
    ChoiceError,
    DataError,
    Fields,
    parse_block,
    split_by_document,
    without_text,
)
from data_pipeline.shards import parse_shard
from data_pipeline.sources import Source, find_sources
from data_pipeline.splits import SPLITS
from data_pipeline.tokenize import Report, tokenize
from data_pipeline.tokenizer import VocabularyError, load_tokenizer, train_tokenizer

_EMBEDDED_VOCABULARY = 2048
_LEAST_PIECES, _MOST_PIECES, _BYTES_PER_PIECE = 512, 32_000, 1500
"""Of a vocabulary whose size is not given."""
_FEW = 20
"""Documents on which a score says little."""
Shares = tuple[int, int, int]
"""Percents of train, val and test."""


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
    vocabulary_size: int | None,
    kind: str = "bpe",
    max_bytes: int = 256 << 20,
    text_field: str = "text",
    subset_field: str = "meta.pile_set_name",
    split: str | None = None,
    window_mb: int = WINDOW_MB,
) -> int:
    """Train a tokenizer on the training documents of some sources and write it to ``out``.

    If the same command wrote it before, it stays as it is.

    Args:
        vocabulary_size: None: one that suits the amount of text, at most 32,000.
        split: the split of every source, whatever its name, or percents as in `parse_split`.

    Returns:
        The size of the vocabulary.

    Raises:
        DataError: if the sources hold no training documents, or another file is there.
    """
    split, shares = parse_split(split)
    sources, _ = _find(names, window_mb, split, shares)
    held_out = [source for source in sources if (split or source.split) in ("val", "test")]
    chosen = [source for source in sources if source not in held_out]
    if not chosen:
        raise ChoiceError(
            f"{held_out[0].name}: is held out ({split or held_out[0].split}), like all other "
            "sources; a tokenizer needs training text (--split train uses these sources as such)"
        )
    if held_out:
        _say(f"{len(held_out)} held-out source(s) not read: {held_out[0].name} …")
    fields = Fields(text_field, subset_field, "unknown")
    algorithm: Literal["unigram", "bpe"] = "bpe" if kind == "bpe" else "unigram"
    texts = _TrainingTexts(chosen, fields, split, shares or SHARES)
    asked = {
        "vocabulary_size": vocabulary_size, "type": kind, "max_bytes": max_bytes,
        "text_field": text_field, "subset_field": subset_field,
    }  # fmt: skip
    with held(out):
        if is_made(out, chosen, split, shares or SHARES, asked):
            _say(f"{out}: was made of the same files before: nothing is left to do")
            return load_tokenizer(out).vocabulary_size
        texts.check()
        size = vocabulary_size or _suitable_size(texts, max_bytes)
        _say(
            f"tokenizer: learning {size:,} pieces from up to {max_bytes >> 20} MB; about a minute "
            "per 50 MB"
        )
        try:
            model = train_tokenizer(texts, size, algorithm, max_bytes)
        except VocabularyError as error:
            if vocabulary_size or not error.largest:
                raise
            size = error.largest
            _say(f"tokenizer: the text has only {size:,} pieces")
            model = train_tokenizer(texts, size, algorithm, max_bytes)
        texts.say_problems()
        write_aside(out, model)
        write_record(out, model, chosen, texts.count, split, shares or SHARES, asked)
    return size


def _suitable_size(texts: _TrainingTexts, max_bytes: int) -> int:
    """A vocabulary whose pieces occur often enough in the text to be learned."""
    total = 0
    for text in texts:
        total += len(text.encode("utf-8"))
        if total >= max_bytes:
            break
    return max(_LEAST_PIECES, min(_MOST_PIECES, total // _BYTES_PER_PIECE))


class _TrainingTexts:
    """Texts of training documents; sources without a split are divided as in tokenising."""

    def __init__(
        self, sources: list[Source], fields: Fields, split: str | None, shares: Shares
    ) -> None:
        self._sources, self._fields, self._split = sources, fields, split
        self._shares = shares
        self._problems: list[str] = []
        self.count = 0
        """Texts of the last reading."""

    def __iter__(self) -> Iterator[str]:
        self._problems, self.count = [], 0  # the sources may be read twice
        for source in self._sources:
            split = self._split or source.split
            for block in source.open_blocks(self._fields):
                parsed = parse_block(block, self._fields)
                self._problems += parsed.problems
                for document in parsed.documents:
                    if (split or split_by_document(document.text, self._shares)) == "train":
                        self.count += 1
                        yield document.text

    def check(self) -> None:
        """Refuse sources without a text.

        Raises:
            DataError: with the first malformed record.
        """
        if next(iter(self), None) is None:
            text = f"no training document in {len(self._sources)} source(s)"
            first = self._problems[0] if self._problems else ""
            raise without_text(f"{text} ({self._sources[0].name})", first)

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
    shard: str | None = None,
) -> Report:
    """Tokenise named sources, with progress on standard error.

    Args:
        shard: ``3/8``: only the third of eight parts of the sources.
        split: as in `train_from_sources`.
    """
    split, shares = parse_split(split)
    sources, left_out = _find(names, window_mb, split, shares)
    fields = Fields(text_field, subset_field, default_subset)
    settings = EncodingSettings(
        tokenizer, eod_token, fields, split, strict, special, lossless, shares or SHARES
    )
    if not (out / MANIFEST).exists():
        for line in remarks(
            tokenizer, settings.open_tokenizer().sha256, sources, split, settings.shares
        ):
            _say(line)
    try:
        report = tokenize(
            sources, settings, out, workers, _Meter(), tell=_say, left_out=left_out,
            shard=parse_shard(shard) if shard else None,
        )  # fmt: skip
        if not report.already_done and report.shard is None:
            _say_held_out(report.manifest)
        return report
    except MemoryError:
        raise DataError(
            f"{out}: memory ran out; rerun the command with fewer --workers than {workers}, or "
            "on a larger machine: what was finished is kept"
        ) from None


def _say_held_out(manifest: dict[str, Any]) -> None:
    """Say what is missing for scoring models."""
    count = dict.fromkeys(("train", "val", "test"), 0)
    for entry in manifest["entries"]:
        count[entry["split"]] += entry["documents"]
    if not count["train"]:
        return  # made for scoring alone
    if not count["val"]:
        _say(
            "no validation documents, on which a run is scored while it trains: --split 98,1,1 "
            "takes some from the training documents"
        )
    few = [f"{count[split]} in {split}" for split in ("val", "test") if 0 < count[split] < _FEW]
    if few:
        _say(
            f"few held-out documents ({', '.join(few)}), so scores on them are uncertain; give "
            "more documents, or them a larger share with --split"
        )


def parse_split(text: str | None) -> tuple[str | None, Shares | None]:
    """What ``--split`` says: one split for everything, or percents of train, val and test.

    Args:
        text: train, val, test, or ``90,5,5``.

    Raises:
        DataError: if it is neither.
    """
    if text is None or text in SPLITS:
        return text, None
    parts = text.split(",")
    if len(parts) == 3 and all(part.strip().isdecimal() for part in parts):
        train, val, test = (int(part) for part in parts)
        if train > 0 and train + val + test == 100:
            return None, (train, val, test)
    raise ChoiceError(
        f"--split: {text!r} is not train, val or test, nor percents of them whose sum is 100, such "
        "as 98,1,1"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _find(
    names: list[str], window_mb: int, split: str | None, shares: Shares | None
) -> tuple[list[Source], list[str]]:
    """The sources, and lines about files that are left out; both are printed.

    Args:
        shares: divide every source like this; None: only those whose name means no split.
    """
    left_out: list[str] = []
    tell = _say if split is None and shares is None else None
    sources = find_sources(names, window_mb=window_mb, tell=tell, left_out=left_out)
    for line in left_out:
        _say(line)
    if shares:
        sources = [replace(source, split=None) for source in sources]
    if split is None:
        _say_splits(sources, shares or SHARES)
    return sources, left_out


def _say_splits(sources: list[Source], shares: Shares) -> None:
    """One line: which sources are a split by their names, and how many are divided."""
    parts = []
    divided = f"divided {' : '.join(map(str, shares))} by document"
    for split in (*SPLITS, None):
        names = [source.name for source in sources if source.split == split]
        if names:
            kind = f"{split} by name" if split else divided
            parts.append(f"{len(names)} {kind} ({names[0]}{' …' if len(names) > 1 else ''})")
    _say(f"sources: {', '.join(parts)}")


class _Meter:
    """Prints a line every few seconds, if more documents are complete."""

    def __init__(self) -> None:
        self._bytes = self._documents = 0
        self._told = -1
        self._began = self._shown = time.monotonic()

    def __call__(self, size: int, documents: int) -> None:
        self._bytes += size
        self._documents += documents
        now = time.monotonic()
        if now - self._shown >= 5 and self._documents != self._told:
            self._shown, self._told = now, self._documents
            speed = self._bytes / 1e6 / (now - self._began)
            print(
                f"tokenize: {self._documents:,} documents, {self._bytes / 1e6:,.1f} MB of records, "
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
    unknown = {entry.split for entry in manifest.entries if entry.tokens and not entry.bytes}
    for entry in manifest.entries:
        for index, value in enumerate((entry.documents, entry.tokens, entry.bytes)):
            totals[entry.split][index] += value

    def row(split: str, subset: str, documents: int, tokens: int, size: int) -> None:
        known = size > 0 and not (subset == "all" and split in unknown)
        table.add_row(
            split,
            escape(subset if subset.isprintable() else ascii(subset)),
            f"{documents:,}",
            f"{tokens:,}",
            f"{size:,}" if known else "?",
            f"{size / max(1, tokens):.2f}" if known else "?",
            f"{tokens / max(1, totals[split][1]):.1%}",
        )

    for entry in manifest.entries:
        row(entry.split, entry.subset, entry.documents, entry.tokens, entry.bytes)
    for split, (documents, tokens, size) in totals.items():
        row(split, "all", documents, tokens, size)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    present = {entry.subset for entry in manifest.entries} & set(PILE_WEIGHTS)
    of_the_pile = f"{len(present)} of the Pile's {len(PILE_WEIGHTS)} subsets; " if present else ""
    print(
        f"tokenizer: {manifest.vocabulary_size:,} tokens, sha256 {manifest.tokenizer_sha256[:12]}; "
        f"tokens stored as {manifest.dtype}; {of_the_pile}"
        f"{manifest.malformed} malformed records skipped"
    )
    if unknown:
        print("?: only held-out texts of adopted tokens are measured")
    for line in manifest.left_out:
        print(line)
