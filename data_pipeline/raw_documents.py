"""Whole documents for scoring, from files of text or from a tokenised folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipeline.dataset import HeldOut, held_out
from data_pipeline.encode import hash_text
from data_pipeline.manifest import MANIFEST, Manifest, load_manifest
from data_pipeline.records import (
    ChoiceError,
    Fields,
    parse_block,
    split_by_document,
    without_text,
)
from data_pipeline.sources import Source, Tell, find_sources

Encode = Callable[[list[str]], list[np.ndarray]]
"""Token ids of each of some texts."""


@dataclass(frozen=True)
class RawDocument:
    """A text to score."""

    subset: str
    text: str
    bytes: int
    hash: int


def is_tokenised(data: Sequence[Path]) -> bool:
    """Whether ``data`` is a folder that `data tokenize` or `data adopt` wrote."""
    return len(data) == 1 and (data[0] / MANIFEST).is_file()


def read_documents(
    data: Sequence[Path],
    split: str | None,
    limit: int | None,
    tell: Tell,
    fields: Fields | None = None,
) -> tuple[list[RawDocument], str]:
    """The documents of files, folders of files, or a tokenised folder, and the split's name.

    Args:
        split: None: test; all documents of files if none of them means test.
        limit: only so many, those with the smallest hashes, as in `held_out`.
        tell: called with a line about what is left out.
        fields: where a record of a file has its text and its subset; a file's name is the subset of
            records without one.

    Raises:
        DataError: if there are none, with the reason.
    """
    if is_tokenised(data):
        chosen = _decoded(load_manifest(data[0]), split or "test", limit, tell)
        return chosen, split or "test"
    sources = find_sources([str(path) for path in data], tell=tell)
    if split is None:
        named = [source for source in sources if source.split == "test"]
        split, sources = ("test", named) if named else ("all", sources)
    reader = _Reader(split, fields or Fields())
    documents = [document for source in sources for document in reader.read(source)]
    reader.tell_problems(tell)
    if not documents:
        raise ChoiceError(f"{data[0]}: no document of split {split}; give another --split")
    if limit is not None:
        documents = sorted(documents, key=lambda one: (one.hash, one.subset))[:limit]
    return sorted(documents, key=lambda one: one.subset), split


class _Reader:
    """Reads the documents of one split, and counts malformed records."""

    def __init__(self, split: str, fields: Fields) -> None:
        self._split, self._fields = split, fields
        self._problems: list[str] = []
        self._parsed = 0
        """Documents, of any split."""

    def read(self, source: Source) -> list[RawDocument]:
        """The documents of a source that are in the split."""
        split = self._split
        if split != "all" and source.split not in (None, split):
            return []
        fields = replace(self._fields, default_subset=Path(source.name).name.split(".")[0])
        found = []
        for block in source.open_blocks(fields):
            parsed = parse_block(block, fields)
            self._problems += parsed.problems
            self._parsed += len(parsed.documents)
            for document in parsed.documents:
                text = document.text
                if split == "all" or split == (source.split or split_by_document(text)):
                    raw = text.encode("utf-8")
                    found.append(RawDocument(document.subset, text, len(raw), hash_text(raw)))
        return found

    def tell_problems(self, tell: Tell) -> None:
        """Tell about malformed records.

        Raises:
            DataError: if they are all records that were read.
        """
        if not self._problems:
            return
        count, first = len(self._problems), self._problems[0]
        if not self._parsed:
            raise without_text(f"no usable document in {count} record(s)", first)
        tell(f"{count} malformed record(s) skipped; the first: {first}")


def _decoded(manifest: Manifest, split: str, limit: int | None, tell: Tell) -> list[RawDocument]:
    """The texts of a tokenised folder; their bytes are those of the decoded texts."""
    tokenizer = manifest.open_tokenizer()
    documents, lossy = [], 0
    for one in held_out(manifest, split, limit):
        text = tokenizer.decode(tokenizer.inside(one.tokens))
        size = len(text.encode("utf-8"))
        lossy += size != one.bytes
        documents.append(RawDocument(one.subset, text, size, one.hash))
    if lossy:
        tell(
            f"{manifest.path}: its tokenizer does not keep the text of {lossy} of "
            f"{len(documents)} documents; what it decodes to is scored"
        )
    return documents


def encode_documents(documents: list[RawDocument], encode: Encode) -> list[HeldOut]:
    """The documents as tokens."""
    encoded = encode([document.text for document in documents])
    return [
        HeldOut(document.subset, ids, document.bytes, document.hash)
        for document, ids in zip(documents, encoded, strict=True)
    ]
