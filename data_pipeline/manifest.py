"""``manifest.json``: what a tokenised folder holds, and with which tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.sources import DataError
from data_pipeline.tokenizer import Tokenizer

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One subset of one split."""

    split: str
    subset: str
    prefix: Path
    documents: int
    tokens: int
    bytes: int
    first: int = 0
    """Number of its first document in the file, which may hold other splits too."""
    file_documents: int = 0
    file_tokens: int = 0
    """Of the whole file; 0: it holds this entry alone."""
    packed: int = 0
    """Tokens of every sequence, where each is a sample as it lies; 0: documents."""
    index: str = ""
    """File with the bytes and hashes of the documents; empty: beside the tokens."""


@dataclass(frozen=True)
class Manifest:
    """A tokenised folder."""

    path: Path
    entries: tuple[Entry, ...]
    vocabulary_size: int
    eod: int
    tokenizer: Path
    tokenizer_sha256: str
    dtype: str
    malformed: int

    def split(self, name: str) -> list[Entry]:
        """The subsets of a split.

        Raises:
            DataError: if there are none.
        """
        found = [entry for entry in self.entries if entry.split == name]
        if not found:
            known = sorted({entry.split for entry in self.entries})
            raise DataError(f"{self.path}: no split {name!r}; it has {', '.join(known)}")
        return found


def manifest_values(
    tokenizer_file: str,
    tokenizer: Tokenizer,
    dtype: str,
    entries: list[dict[str, Any]],
    malformed: int,
    sources: list[dict[str, Any]],
    identity: dict[str, Any],
) -> dict[str, Any]:
    """What ``manifest.json`` says; the inverse of `load_manifest`.

    Args:
        tokenizer_file: its name in the folder.
        entries: fields of `Entry`, the prefix relative to the folder.
        identity: what the folder was made of, for whoever would go on with it.
    """
    return {
        "version": MANIFEST_VERSION,
        "tokenizer": {
            "file": tokenizer_file,
            "sha256": tokenizer.sha256,
            "vocabulary_size": tokenizer.vocabulary_size,
            "eod": tokenizer.eod,
        },
        "dtype": dtype,
        "entries": entries,
        "malformed": malformed,
        "sources": sources,
        "identity": identity,
    }


def load_manifest(path: Path) -> Manifest:
    """Read ``manifest.json`` of a tokenised folder.

    Raises:
        DataError: if it is missing, unfinished or unreadable.
    """
    file = path / MANIFEST
    if not file.is_file():
        if (path / ".parts").is_dir():
            raise DataError(
                f"{path}: tokenisation is not finished; repeat `pretrain data tokenize`"
            )
        raise DataError(f"{path}: no {MANIFEST}; make the folder with `pretrain data tokenize`")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["version"] != MANIFEST_VERSION:
            raise DataError(
                f"{file}: version {values['version']}, this program reads {MANIFEST_VERSION}; "
                "tokenise again"
            )
        entries = tuple(
            Entry(**{**entry, "prefix": path / entry["prefix"]}) for entry in values["entries"]
        )
        tokenizer = values["tokenizer"]
        return Manifest(
            path,
            entries,
            tokenizer["vocabulary_size"],
            tokenizer["eod"],
            path / tokenizer["file"],
            tokenizer["sha256"],
            values["dtype"],
            values["malformed"],
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(f"{file}: not a manifest ({error!r}); tokenise again") from None
