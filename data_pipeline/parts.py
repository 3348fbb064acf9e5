"""Progress of a tokenisation on disk: parts, and which blocks of which source are in them.

The progress is in a hidden folder beside the results. Each part holds documents of one source, so
that a changed source can be read again without the others.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipeline.account import Account
from data_pipeline.encode import Encoded, Key
from data_pipeline.files import is_leftover, read_json, write_aside
from data_pipeline.part_file import SUFFIX, PartPiece, read_folder, read_part, write_part
from data_pipeline.records import ChoiceError, DataError
from data_pipeline.sources import Source, Tell, sha256_of
from data_pipeline.strict_json import to_json

FOLDER = ".parts"
STATE = "state.json"
SPECIAL = "use of special tokens"
"""Key of an identity, present if it is not the default."""
WHOLE = "whole"
"""Folder inside it for files that are being joined."""
_SHOWN_PROBLEMS = 20


@dataclass
class SourceState:
    """Progress of one source."""

    name: str
    split: str | None
    stamp: list[int]
    blocks: int = 0
    done: bool = False
    sha256: str | None = None
    """SHA-256 of the file as it was read, after it is done."""
    documents: int = 0
    malformed: int = 0
    shown: list[str] = field(default_factory=list)
    """The first malformed records, with their reasons."""
    account: dict[str, Any] = field(default_factory=dict)
    """How exactly its documents are reproduced, as values of `Account`."""

    def count(self, account: Account) -> None:
        """Add the counts of some documents."""
        whole = Account(**self.account)
        whole.add(account)
        self.account = whole.values()

    def record_problems(self, problems: list[str]) -> None:
        """Count malformed records and keep some."""
        self.malformed += len(problems)
        self.shown += problems[: max(0, _SHOWN_PROBLEMS - len(self.shown))]

    def is_of(self, source: Source) -> bool:
        """Whether the source is unchanged since this was recorded; its bytes decide.

        Equal size and times are taken as equal bytes: a change of the contents sets the time of the
        last change, which no program can set back.
        """
        if self.split != source.split or self.stamp[0] != source.size:
            return False
        if source.path is None:
            return self.name == source.name
        if self.stamp == list(source.stamp):
            return True
        return self.sha256 is not None and sha256_of(source.path) == self.sha256


def recorded_sources(manifest: dict[str, Any]) -> list[SourceState]:
    """The sources of a finished folder, of this version or an earlier one."""
    splits = [source[2] for source in manifest["identity"].get("sources", [])]  # earlier versions
    return [
        SourceState(
            source["name"],
            source.get("split", splits[i] if i < len(splits) else None),
            source.get("stamp", [source["size"], 0, 0]),
            sha256=source["sha256"],
        )
        for i, source in enumerate(manifest["sources"])
    ]


def why_others(identity: dict[str, Any], recorded: Any, same_files: bool) -> str:
    """A description of what differs between the identities of two folders; empty: nothing.

    Args:
        same_files: whether both are of the same sources.
    """
    before = recorded if isinstance(recorded, dict) else {}
    keys = [key for key in identity if before.get(key) != identity[key]]
    keys += [key for key in (SPECIAL,) if key in before and key not in identity]
    if "dealing" in before and "dealing" in keys:
        # Either names gave splits there, or did not; or the shares differ.
        both = before["dealing"] and identity["dealing"]
        keys[keys.index("dealing")] = "shares" if both or same_files else "sources"
    words = {
        "sources": "other sources",
        "tokenizer": "another tokenizer",
        "fields": "other fields",
        "shares": "another division into splits (--split)",
        "dealing": "an earlier rule for dividing documents into splits",
    }
    return " and ".join(words.get(key, f"another {key}") for key in keys)


def same_names(before: list[SourceState], sources: list[Source]) -> bool:
    """Whether recorded sources have the paths of these."""
    names = [[os.path.abspath(one.name) for one in some] for some in (before, sources)]  # noqa: PTH100
    return names[0] == names[1]


def _name(part: dict[str, Any]) -> str:
    """The part's file, or its folder (of earlier versions)."""
    return str(part["file"] if "file" in part else part["folder"])


def _number(part: dict[str, Any]) -> int:
    return int(_name(part).removesuffix(SUFFIX))


class Parts:
    """What is finished, and where it is."""

    def __init__(self, out: Path, identity: dict[str, Any], sources: list[Source]) -> None:
        self.out, self.identity = out, identity
        self.folder = out / FOLDER
        self.parts: list[dict[str, Any]] = []
        self.sources = [
            SourceState(source.name, source.split, list(source.stamp)) for source in sources
        ]
        self._unread = [replace(source) for source in self.sources]
        self.borrows = False
        """Whether the parts are those of shards: then nothing of them is recorded here."""
        self.targets: list[str] = []
        """Files of the finished folder that are being written."""
        self._next = 0

    @property
    def malformed(self) -> int:
        """Number of records that were reported and skipped."""
        return sum(source.malformed for source in self.sources)

    @property
    def account(self) -> Account:
        """The counts over all documents so far."""
        whole = Account()
        for source in self.sources:
            whole.add(Account(**source.account))
        return whole

    @property
    def shown(self) -> list[str]:
        """Some of the malformed records, with their reasons."""
        return [line for source in self.sources for line in source.shown][:_SHOWN_PROBLEMS]

    def load(self, sources: list[Source], tell: Tell) -> bool:
        """Read the progress of an interrupted run, and remove what it had not recorded.

        Returns:
            Whether there was any progress.

        Raises:
            DataError: if it was made of other sources or in another way.
        """
        path = self.folder / STATE
        resumed = path.exists() and self.read(sources, tell)
        self.folder.mkdir(parents=True, exist_ok=True)
        known = {_name(part) for part in self.parts}
        for entry in sorted(self.folder.iterdir()):
            if entry.name in known or entry.name == path.name:
                continue
            if (entry.name.isdigit() or entry.name == WHOLE) and entry.is_dir():
                shutil.rmtree(entry)
            elif (
                is_leftover(entry.name, path.name)
                or entry.name == f"{path.name}.tmp"
                or (entry.suffix == SUFFIX and entry.stem.isdigit())
            ):
                entry.unlink()
            else:
                raise ChoiceError(
                    f"{entry}: was not made by this command; choose another --out or move it"
                )
        self._save()
        return resumed

    def read(self, sources: list[Source], tell: Tell) -> bool:
        """Take over recorded progress; False if there is none that this command could spoil.

        Raises:
            DataError: if it was made of other sources or in another way.
        """
        path = self.folder / STATE
        try:
            state = read_json(path)
            before = [SourceState(**source) for source in state["sources"]]
            same = same_names(before, sources)
            reason = why_others(self.identity, state["identity"], same)
            self.parts, self.targets, self._next = state["parts"], state["made"], state["next"]
            failed = bool(state.get("failed", False))
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{path}: was written by another version; delete {self.folder} to start again"
            ) from None
        if not reason and not same:
            reason = "other sources"
        if reason and not self.targets and (failed or not self.parts):
            if self.parts:
                tell(f"{self.out}: was started with {reason}, and failed; starting again")
            self.parts = []
            return False
        if reason:
            raise ChoiceError(
                f"{self.out}: was started with {reason}; choose another --out, or delete "
                f"{self.folder} to start again"
            )
        for index, (old, source) in enumerate(zip(before, sources, strict=True)):
            if (not old.blocks and not old.done) or old.is_of(source):
                old.stamp, old.split = list(source.stamp), source.split
                self.sources[index] = old
            else:
                tell(f"{source.name}: has changed since it was read; reading it again")
                self.parts = [part for part in self.parts if part["source"] != index]
        return True

    def commit(self, index: int, results: dict[Key, Encoded]) -> None:
        """Save finished blocks: write their files, then record them in the state."""
        if results:
            name = f"{self._next:06d}{SUFFIX}"
            write_part(self.folder / name, results)
            self.parts.append({"file": name, "source": index})
            self._next += 1
        self._save()

    def fail(self) -> None:
        """Record that this attempt ended with an error, so that other settings may follow it.

        What was saved stays as it is: this object may have counted blocks that are in no part.
        """
        path = self.folder / STATE
        with contextlib.suppress(OSError, ValueError):  # the error that ended it is told
            write_aside(path, to_json({**read_json(path), "failed": True}).encode())

    def in_order(self) -> list[dict[str, Any]]:
        """Parts in the order of their sources, including those that were read again."""
        return sorted(self.parts, key=lambda part: (part["source"], _number(part)))

    def pieces(self) -> Iterator[PartPiece]:
        """The documents of all parts, in order."""
        for part in self.in_order():
            place = Path(part.get("of", self.folder)) / _name(part)
            yield from (
                read_folder(place, part["entries"]) if "entries" in part else read_part(place)
            )

    def will_make(self, names: list[str]) -> None:
        """Record that these files of the finished folder are made by this command.

        Raises:
            DataError: if one already exists that this command did not make.
        """
        for name in names:
            if name not in self.targets and os.path.lexists(self.out / name):
                raise ChoiceError(
                    f"{self.out / name}: already exists and was not made by this command; choose "
                    "another --out or move it"
                )
        self.targets = sorted({*self.targets, *names})
        self._save()

    def _save(self) -> None:
        state = {
            "identity": self.identity,
            "parts": [] if self.borrows else self.parts,
            "sources": [vars(one) for one in (self._unread if self.borrows else self.sources)],
            "made": self.targets,
            "next": self._next,
        }
        write_aside(self.folder / STATE, to_json(state).encode())
