"""Turns raw sources into Megatron ``.bin/.idx`` pairs, one per split and subset; restartable.

Blocks of records go to worker processes and come back in order. After every N bytes the results
become a *part*: files with temporary names, recorded by one rename (`data_pipeline.parts`). An
interrupted run keeps its parts. The last step joins them and writes ``manifest.json``, whose
presence means that the folder is complete (`data_pipeline.assemble`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.assemble import assemble, check_free
from data_pipeline.encode import Encoded, Encoder, EncodingSettings, Key, Result
from data_pipeline.files import locked, read_json
from data_pipeline.manifest import MANIFEST
from data_pipeline.parts import SPECIAL, Parts, recorded_sources, same_names, why_others
from data_pipeline.records import ChoiceError, DataError, RecordBlock
from data_pipeline.shards import (
    SHARDS,
    Shard,
    refuse_undivided,
    sources_of,
    take_shards,
)
from data_pipeline.sources import Source, Tell, sha256_of, stamp_of
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.watch import Watch

_LARGE_RECORD = 32 << 20
PART_BYTES = 256 << 20
"""Bytes of text after which progress is saved."""

Progress = Callable[[int, int], None]
"""A function that is called with (source bytes of finished blocks, documents) during the work."""
_Encode = Callable[[Iterator[tuple[RecordBlock, str | None]]], Iterator[Result]]


@dataclass(frozen=True)
class Report:
    """A summary of what was done."""

    manifest: dict[str, Any]
    already_done: bool
    resumed: bool
    seconds: float
    problems: int
    shown: list[str]
    shard: Shard | None = None
    """The shard that was made; then there is no manifest yet."""


def tokenize(
    sources: list[Source],
    settings: EncodingSettings,
    out: Path,
    workers: int = 1,
    progress: Progress | None = None,
    part_bytes: int = PART_BYTES,
    tell: Tell | None = None,
    left_out: list[str] | None = None,
    shard: Shard | None = None,
) -> Report:
    """Tokenise ``sources`` into ``out``, or join the shards that are there.

    Args:
        workers: processes that parse and encode.
        part_bytes: bytes of text after which progress is saved.
        tell: called with each line to print.
        left_out: lines about files that are left out, for the manifest.
        shard: read only its part of the sources, and join nothing.

    Raises:
        DataError: for a damaged source, for a folder made from other sources or with another
            tokenizer or being written by another process, with ``strict`` for the first malformed
            record, and with ``lossless`` for the first document that the tokenizer does not
            reproduce.
    """
    started = time.monotonic()
    say: Tell = tell or (lambda line: None)
    move: Progress = progress or (lambda size, documents: None)
    tokenizer = settings.open_tokenizer()
    identity = _identity(sources, settings, tokenizer)
    finished = _finished(out, identity, sources)
    if finished is not None:
        return Report(finished, True, False, 0.0, 0, [])
    mine = range(len(sources)) if shard is None else sources_of(shard, sources)
    if shard is not None:
        refuse_undivided(out)
        check_free(out, settings)
    folder = out if shard is None else shard.folder(out)
    with locked(folder):
        # Another process may have finished it in the meantime.
        finished = _finished(out, identity, sources)
        if finished is not None:
            return Report(finished, True, False, 0.0, 0, [])
        state = Parts(folder, identity, sources)
        resumed = state.load(sources, say)
        if not resumed and shard is None:
            check_free(out, settings)
        if shard is None and (out / SHARDS).is_dir():
            take_shards(state, sources, say)
        for note in tokenizer.notes:
            say(f"tokenizer: {note}")
        watch = Watch(state.account, tokenizer, settings, say)
        try:
            with Encoder(settings, tokenizer, workers, lambda: move(0, 0)) as encode:
                for index in mine:
                    if not state.sources[index].done:
                        _tokenize_source(
                            sources[index], index, encode, settings, state, part_bytes, move, say,
                            watch,
                        )  # fmt: skip
            watch.finish()
            manifest = {} if shard else assemble(state, settings, tokenizer, left_out or [])
        except DataError:
            state.fail()
            raise
        if shard is None and (out / SHARDS).is_dir():
            shutil.rmtree(out / SHARDS)
    seconds = time.monotonic() - started
    return Report(manifest, False, resumed, seconds, state.malformed, state.shown, shard)


def _identity(
    sources: list[Source], settings: EncodingSettings, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The settings that a folder is made with, apart from the sources."""
    dealt = settings.split is None and any(source.split is None for source in sources)
    # The default is not recorded, so that folders of earlier versions still match.
    special = [name for name, value in asdict(settings.special).items() if value]
    return {
        "tokenizer": tokenizer.sha256,
        **({SPECIAL: special} if special else {}),
        "eod": tokenizer.eod,
        "fields": [settings.fields.text, settings.fields.subset, settings.fields.default_subset],
        "split": settings.split,
        # Earlier versions divided 97.7 : 1.2 : 1.2 and recorded nothing.
        "dealing": ":".join(map(str, settings.shares)) if dealt else None,
    }


def _finished(out: Path, identity: dict[str, Any], sources: list[Source]) -> dict[str, Any] | None:
    """The manifest of a complete folder, or None.

    Raises:
        DataError: if the folder was made of other sources or in another way.
    """
    path = out / MANIFEST
    if not path.exists():
        return None
    try:
        manifest: dict[str, Any] = read_json(path)
        before = recorded_sources(manifest)
        reason = why_others(identity, manifest["identity"], same_names(before, sources))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise ChoiceError(f"{path}: is not a manifest of tokens; choose another --out") from None
    same = len(before) == len(sources)
    if not reason and not (same and all(b.is_of(s) for b, s in zip(before, sources, strict=True))):
        reason = "other sources"
        changed = [s.name for b, s in zip(before, sources, strict=False) if same and not b.is_of(s)]
        if changed:
            reason += f" ({changed[0]} has changed)"
    if reason:
        raise ChoiceError(f"{out}: was made with {reason}; choose another --out or delete it")
    return manifest


def _tokenize_source(
    source: Source,
    index: int,
    encode: _Encode,
    settings: EncodingSettings,
    state: Parts,
    part_bytes: int,
    move: Progress,
    say: Tell,
    watch: Watch,
) -> None:
    mine = state.sources[index]
    skip = mine.blocks
    split = settings.split or source.split

    def blocks() -> Iterator[tuple[RecordBlock, str | None]]:
        for number, block in enumerate(source.open_blocks(settings.fields)):
            if number >= skip:
                _announce(block, say)
                yield block, split

    pending: dict[Key, Encoded] = {}
    size = 0
    for result in encode(blocks()):
        if result.problems and settings.strict:
            raise DataError(result.problems[0])
        watch.see(result.account)
        mine.count(result.account)
        mine.record_problems(result.problems)
        mine.documents += result.count
        mine.blocks += 1
        for key, encoded in result.encoded.items():
            pending.setdefault(key, Encoded()).extend(encoded)
        size += result.bytes
        move(result.raw_bytes, result.count)
        if size >= part_bytes:
            state.commit(index, pending)
            pending, size = {}, 0
    if source.path is not None:
        mine.sha256 = sha256_of(source.path)
        if stamp_of(source.path)[:2] != source.stamp[:2]:
            raise DataError(
                f"{source.name}: has changed while it was read; rerun the command when nothing "
                "writes to it any more"
            )
    mine.done = True
    state.commit(index, pending)
    if not mine.documents and not mine.malformed:
        say(f"{source.name}: contains no document")


def _announce(block: RecordBlock, say: Tell) -> None:
    """Report a record that will take long, before it is encoded."""
    for number, record in enumerate(block.records, block.first):
        if isinstance(record, bytes) and len(record) > _LARGE_RECORD:
            say(f"{block.name}:{number}: one record of {len(record) >> 20:,} MB")
