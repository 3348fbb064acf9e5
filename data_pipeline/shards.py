"""A tokenisation that several machines divide: each reads some of the sources, one joins them.

Every shard has the progress of an ordinary tokenisation in ``OUT/.shards/I-of-N``, but reads only
its own sources. The same command without ``--shard`` joins them; the result is byte for byte
that of one machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.files import read_json
from data_pipeline.parts import FOLDER, STATE, Parts
from data_pipeline.records import ChoiceError, DataError
from data_pipeline.sources import Source, Tell

SHARDS = ".shards"
_NAME = re.compile(r"([1-9]\d{0,5})-of-([1-9]\d{0,5})")


@dataclass(frozen=True)
class Shard:
    """One of several parts of the sources."""

    number: int
    """From 1 to ``of``."""
    of: int

    def __str__(self) -> str:
        return f"shard {self.number} of {self.of}"

    def folder(self, out: Path) -> Path:
        """Its progress."""
        return out / SHARDS / f"{self.number}-of-{self.of}"


def parse_shard(text: str) -> Shard:
    """``3/8``, the third of eight.

    Raises:
        DataError: if the text is something else.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    if match and 1 <= int(match[1]) <= int(match[2]):
        return Shard(int(match[1]), int(match[2]))
    raise ChoiceError(
        f"--shard: {text!r} is not the number of a shard and their count, such as 3/8"
    )


def sources_of(shard: Shard, sources: list[Source]) -> list[int]:
    """Indices of a shard's sources: shards have about the same number of bytes.

    Raises:
        DataError: if there are fewer sources than shards.
    """
    if len(sources) < shard.of:
        raise ChoiceError(
            f"--shard: {shard.of} shards of {len(sources)} source(s), which are not divided; use "
            f"at most {len(sources)} shards, or write the documents into more files"
        )
    loads = [0] * shard.of
    members: list[list[int]] = [[] for _ in loads]
    # The largest first, each to the shard that has least; of equal ones, to the first.
    for index in sorted(range(len(sources)), key=lambda index: (-sources[index].size, index)):
        least = min(range(shard.of), key=lambda one: (loads[one], len(members[one]), one))
        members[least].append(index)
        loads[least] += sources[index].size
    return sorted(members[shard.number - 1])


def refuse_undivided(out: Path) -> None:
    """Refuse to begin a shard where a tokenisation without shards has begun.

    Raises:
        DataError: naming its folder.
    """
    path = out / FOLDER / STATE
    try:
        begun = path.exists() and bool(read_json(path)["parts"])
    except (KeyError, TypeError, ValueError):
        begun = True
    if begun:
        raise ChoiceError(
            f"{out}: holds the progress of a tokenisation without --shard; continue it without "
            f"--shard, or delete {path.parent}"
        )


def take_shards(state: Parts, sources: list[Source], tell: Tell) -> None:
    """Give a tokenisation the parts of all shards in its folder.

    Raises:
        DataError: naming shards that are missing, not finished, or not of these sources and
            settings, and sources that two shards have read.
    """
    if state.parts:
        raise DataError(
            f"{state.out}: holds shards and the progress of a tokenisation without --shard; delete "
            f"{state.out / SHARDS} or {state.folder}"
        )
    readers: dict[int, list[Shard]] = {index: [] for index in range(len(sources))}
    state.borrows = True
    for shard in _present(state.out):
        part = Parts(shard.folder(state.out), state.identity, sources)
        path = part.folder / STATE
        known = path.exists() and part.read(sources, tell)
        own = [index for index, source in enumerate(part.sources) if known and source.done]
        unread = [index for index in sources_of(shard, sources) if index not in own]
        if unread:
            raise ChoiceError(
                f"{state.out}: {shard} is not finished ({sources[unread[0]].name}); run the same "
                f"command with --shard {shard.number}/{shard.of}"
            )
        for index in own:
            readers[index].append(shard)
            state.sources[index] = part.sources[index]
        state.parts += [
            {**entry, "of": str(part.folder)} for entry in part.parts if entry["source"] in own
        ]
    for index, found in readers.items():
        if len(found) > 1:
            raise DataError(
                f"{sources[index].name}: is in {found[0]} and in {found[1]}; delete "
                f"{found[1].folder(state.out)} and make that shard again"
            )


def _present(out: Path) -> list[Shard]:
    """All shards of a folder, which must be all of one number of shards."""
    found = []
    for entry in sorted((out / SHARDS).iterdir()):
        match = _NAME.fullmatch(entry.name)
        if not match or not entry.is_dir():
            raise ChoiceError(f"{entry}: was not made by this command; move it")
        found.append(Shard(int(match[1]), int(match[2])))
    counts = sorted({shard.of for shard in found})
    if len(counts) > 1:
        raise ChoiceError(
            f"{out}: holds shards of {counts[0]} and of {counts[1]}; delete those of one of them "
            f"in {out / SHARDS}"
        )
    have = {shard.number for shard in found}
    count = counts[0] if counts else 1
    missing = [number for number in range(1, count + 1) if number not in have]
    if missing:
        some = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        raise ChoiceError(
            f"{out}: shard {some} of {count} is missing; run the same command with --shard "
            f"{missing[0]}/{count}"
        )
    return sorted(found, key=lambda shard: shard.number)
