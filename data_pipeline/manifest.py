"""``manifest.json``: the contents of a tokenised folder, and its tokenizer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from data_pipeline.files import read_json
from data_pipeline.json_tokenizer import SpecialTokens
from data_pipeline.records import ChoiceError, DataError
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, name_of_token

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
    """Number of its first document in the file, which may contain other splits too."""
    file_documents: int = 0
    file_tokens: int = 0
    """Number of documents in the whole file; 0: it contains only this entry."""
    packed: int = 0
    """Tokens of every sequence if each is a sample; 0: sequences are documents."""
    index: str = ""
    """File with the bytes and hashes of the documents; empty: beside the tokens."""
    checksums: str = ""
    """File in the folder with the checksums of tokens that are elsewhere; empty: beside them."""
    files: dict[Path, str] = field(default_factory=dict, compare=False)
    """SHA-256 of the folder's files, if they were recorded."""

    @property
    def checksum_file(self) -> Path:
        """Checksums of the tokens."""
        return Path(self.checksums) if self.checksums else self.path(".bin").with_suffix(".crc")

    def path(self, ending: str) -> Path:
        """A file of this entry, such as ``.bin``."""
        return self.prefix.with_name(self.prefix.name + ending)


class _EntryRecord(BaseModel):
    """An entry as the file has it."""

    model_config = ConfigDict(strict=True)

    split: str
    subset: str
    prefix: str
    documents: NonNegativeInt
    tokens: NonNegativeInt
    bytes: NonNegativeInt
    first: NonNegativeInt = 0
    file_documents: NonNegativeInt = 0
    file_tokens: NonNegativeInt = 0
    packed: NonNegativeInt = 0
    index: str = ""
    checksums: str = ""


class _TokenizerRecord(BaseModel):
    model_config = ConfigDict(strict=True)

    file: str
    sha256: str
    vocabulary_size: PositiveInt
    eod: NonNegativeInt
    special: dict[str, bool] = {}


class _Record(BaseModel):
    """The types of a ``manifest.json``."""

    model_config = ConfigDict(strict=True)

    tokenizer: _TokenizerRecord
    entries: list[_EntryRecord]
    dtype: str
    malformed: NonNegativeInt
    files: dict[str, str] = {}
    left_out: list[str] = []


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
    left_out: tuple[str, ...] = ()
    """Files that were left out, one line for each reason."""
    files: dict[Path, str] = field(default_factory=dict)
    """SHA-256 of the folder's files; empty: made by another tool or an earlier version."""
    special: SpecialTokens = SpecialTokens()
    """How special tokens were handled."""

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer with the settings that made the tokens, and its end-of-document token.

        Raises:
            DataError: if its file is missing, damaged, or has no such token.
        """
        name = name_of_token(self.tokenizer, self.eod)
        if name is None:
            raise DataError(
                f"{self.tokenizer}: has no token {self.eod}, which ends the documents of "
                f"{self.path}"
            )
        return load_tokenizer(self.tokenizer, name, self.special)

    def split(self, name: str) -> list[Entry]:
        """The subsets of a split.

        Raises:
            DataError: if there are none.
        """
        entries = [entry for entry in self.entries if entry.split == name]
        if not entries:
            known = sorted({entry.split for entry in self.entries})
            hint = ""
            if known == ["train"]:
                hint = "; `pretrain data tokenize` with --split 98,1,1 takes val and test from it"
            raise ChoiceError(f"{self.path}: no split {name!r}; it has {', '.join(known)}{hint}")
        return entries


def manifest_values(
    tokenizer_file: str,
    tokenizer: Tokenizer,
    dtype: str,
    entries: list[dict[str, Any]],
    malformed: int,
    sources: list[dict[str, Any]],
    identity: dict[str, Any],
    files: dict[str, str] | None = None,
    left_out: list[str] | None = None,
    special: dict[str, bool] | None = None,
    round_trip: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The contents of ``manifest.json``; the inverse of `load_manifest`.

    Args:
        tokenizer_file: its name in the folder.
        entries: fields of `Entry`, the prefix relative to the folder.
        identity: what the folder was made from, to recognise it later.
        files: SHA-256 of each file, by its name in the folder.
        left_out: files that were left out, one line for each reason.
        special: how special tokens are handled, as values of `SpecialTokens`.
        round_trip: how exactly documents are reproduced, as values of `Account`.
    """
    values = {
        "version": MANIFEST_VERSION,
        "tokenizer": {
            "file": tokenizer_file,
            "sha256": tokenizer.sha256,
            "vocabulary_size": tokenizer.vocabulary_size,
            "eod": tokenizer.eod,
            "special": special or {},
        },
        "dtype": dtype,
        "entries": entries,
        "malformed": malformed,
        "sources": sources,
        "identity": identity,
        "files": files or {},
        "left_out": left_out or [],
        "round_trip": round_trip or {},
    }
    return values | {"checksum": _checksum(values)}


def _checksum(values: dict[str, Any]) -> str:
    """Hash of a manifest without this entry itself."""
    rest = {key: value for key, value in values.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _places(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Paths of an entry, relative to this process's folder."""
    checksums = entry.get("checksums", "")
    return {
        "prefix": folder / entry["prefix"],
        "checksums": str(folder / checksums) if checksums else "",
    }


def load_manifest(path: Path) -> Manifest:
    """Read ``manifest.json`` of a tokenised folder.

    Raises:
        DataError: if it is missing, unfinished or unreadable.
    """
    file = path / MANIFEST
    try:
        exists = file.is_file()
    except OSError as error:  # a name too long, no permission
        raise DataError(f"{str(file)[:200]}: cannot be read ({error.strerror})") from None
    if not exists:
        if (path / ".shards").is_dir():
            raise ChoiceError(
                f"{path}: shards are not joined; run `pretrain data tokenize` without --shard when "
                "all of them are finished"
            )
        if (path / ".parts").is_dir():
            raise DataError(f"{path}: tokenisation is not finished; rerun `pretrain data tokenize`")
        raise ChoiceError(f"{path}: no {MANIFEST}; make the folder with `pretrain data tokenize`")
    try:
        values = read_json(file)
        if values["version"] != MANIFEST_VERSION:
            raise DataError(
                f"{file}: has version {values['version']}, but this program reads "
                f"{MANIFEST_VERSION}; tokenise again"
            )
        if values.get("checksum") not in (None, _checksum(values)):
            raise DataError(
                f"{file}: does not match its own checksum; restore it from a copy or tokenise "
                "again (if you edited it, remove its line `checksum`)"
            )
        _Record.model_validate(values)
        files = {path / name: digest for name, digest in values.get("files", {}).items()}
        entries = tuple(
            Entry(**{**entry, **_places(path, entry)}, files=files) for entry in values["entries"]
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
            tuple(values.get("left_out", ())),
            files,
            SpecialTokens(**tokenizer.get("special", {})),
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{file}: not a manifest ({place}: {first['msg'].lower()}); tokenise again"
        ) from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: not a manifest ({error!r}); tokenise again") from None
