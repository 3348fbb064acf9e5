"""Raw sources to Megatron ``.bin/.idx`` pairs, one per split and subset; restartable.

Blocks of records go to worker processes and come back in order. Every so many bytes the
results become a *part*: files written aside, then recorded in ``state.json`` by one rename. An
interrupted run keeps its parts; the last step concatenates them and writes ``manifest.json``,
whose presence means that the folder is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.checksums import Checksums
from data_pipeline.encode import DOCUMENT_TYPE, Encoded, Encoder, Job, Key, Result, token_type
from data_pipeline.files import write_aside, write_synced
from data_pipeline.index_file import write_index
from data_pipeline.manifest import MANIFEST, manifest_values
from data_pipeline.sources import (
    Block,
    DataError,
    Source,
    sha256_of,
)
from data_pipeline.tokenizer import Tokenizer, load_tokenizer

_SHOWN_PROBLEMS = 20

Progress = Callable[[int, int], None]
"""Called with (source bytes of finished blocks, documents) as work proceeds."""


@dataclass(frozen=True)
class Report:
    """What was done."""

    manifest: dict[str, Any]
    already_done: bool
    resumed: bool
    seconds: float
    problems: int
    shown: list[str]


def tokenize(
    sources: list[Source],
    job: Job,
    out: Path,
    workers: int = 1,
    progress: Progress | None = None,
    part_bytes: int = 64 << 20,
) -> Report:
    """Tokenise ``sources`` into ``out``.

    Args:
        workers: processes that parse and encode.
        part_bytes: text after which progress is made safe.

    Raises:
        DataError: for a damaged source, for a folder made from other sources or with another
            tokenizer, and with ``strict`` for the first malformed record.
    """
    started = time.monotonic()
    tokenizer = load_tokenizer(job.tokenizer_path, job.eod_token)
    identity = _identity(sources, job, tokenizer)
    state = _State(out, identity)
    if state.finished is not None:
        return Report(state.finished, True, False, 0.0, 0, [])
    resumed = state.load()
    with Encoder(job, tokenizer, workers) as encode:
        for index, source in enumerate(sources):
            if not state.is_done(index):
                _tokenize_source(source, index, encode, job, state, part_bytes, progress)
    manifest = _assemble(state, sources, job, tokenizer)
    return Report(manifest, False, resumed, time.monotonic() - started, state.problems, state.shown)


def _identity(sources: list[Source], job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer.sha256,
        "eod": tokenizer.eod,
        "sources": [[source.size, source.fingerprint, source.split] for source in sources],
        "fields": [job.fields.text, job.fields.subset, job.fields.default_subset],
        "split": job.split,
    }


class _State:
    """Progress on disk, in a hidden folder beside the results."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out, self.identity = out, identity
        self.folder = out / ".parts"
        self.parts: list[dict[str, Any]] = []
        self.sources: dict[str, dict[str, Any]] = {}
        self.problems = 0
        self.shown: list[str] = []
        self.finished: dict[str, Any] | None = None
        manifest = out / MANIFEST
        if manifest.exists():
            found = json.loads(manifest.read_text(encoding="utf-8"))
            self._check(found.get("identity"))
            self.finished = found

    def _check(self, found: Any) -> None:
        if found == self.identity:
            return
        keys = [key for key in self.identity if (found or {}).get(key) != self.identity[key]]
        what = {"tokenizer": "another tokenizer", "sources": "other sources"}
        reason = " and ".join(what.get(key, f"another {key}") for key in keys)
        raise DataError(f"{self.out}: was made with {reason}; choose another --out or delete it")

    def load(self) -> bool:
        """Read what an interrupted run left; remove what it had not recorded."""
        path = self.folder / "state.json"
        resumed = path.exists()
        if resumed:
            found = json.loads(path.read_text(encoding="utf-8"))
            self._check(found["identity"])
            self.parts, self.sources = found["parts"], found["sources"]
            self.problems, self.shown = found["problems"], found["shown"]
        self.folder.mkdir(parents=True, exist_ok=True)
        known = {part["folder"] for part in self.parts}
        for folder in self.folder.iterdir():
            if folder.is_dir() and folder.name not in known:
                shutil.rmtree(folder)
        self._save()
        return resumed

    def is_done(self, index: int) -> bool:
        return bool(self.sources.get(str(index), {}).get("done"))

    def blocks_done(self, index: int) -> int:
        return int(self.sources.get(str(index), {}).get("blocks", 0))

    def record_problems(self, problems: list[str]) -> None:
        self.problems += len(problems)
        self.shown += problems[: max(0, _SHOWN_PROBLEMS - len(self.shown))]

    def commit(self, index: int, blocks: int, done: bool, results: dict[Key, Encoded]) -> None:
        """Make finished blocks safe: write their files, then name them in the state."""
        if results:
            name = f"{len(self.parts):06d}"
            folder = self.folder / name
            folder.mkdir()
            entries = []
            for number, ((split, subset), encoded) in enumerate(sorted(results.items())):
                write_synced(folder / f"{number}.bin", np.concatenate(encoded.tokens).tobytes())
                write_synced(folder / f"{number}.len", np.concatenate(encoded.lengths).tobytes())
                write_synced(folder / f"{number}.doc", np.concatenate(encoded.documents).tobytes())
                entries.append([split, subset, number])
            self.parts.append({"folder": name, "entries": entries})
        self.sources[str(index)] = {"blocks": blocks, "done": done}
        self._save()

    def _save(self) -> None:
        state = {
            "identity": self.identity,
            "parts": self.parts,
            "sources": self.sources,
            "problems": self.problems,
            "shown": self.shown,
        }
        write_aside(self.folder / "state.json", json.dumps(state).encode())


def _tokenize_source(
    source: Source,
    index: int,
    encode: Callable[[Iterator[tuple[Block, str | None]]], Iterator[Result]],
    job: Job,
    state: _State,
    part_bytes: int,
    progress: Progress | None,
) -> None:
    skip = state.blocks_done(index)
    split = job.split or source.split

    def blocks() -> Iterator[tuple[Block, str | None]]:
        for number, block in enumerate(source.open_blocks()):
            if number >= skip:
                yield block, split

    pending: dict[Key, Encoded] = {}
    count, size = skip, 0
    for result in encode(blocks()):
        if result.problems and job.strict:
            raise DataError(result.problems[0])
        state.record_problems(result.problems)
        for key, encoded in result.encoded.items():
            pending.setdefault(key, Encoded()).extend(encoded)
        count += 1
        size += result.bytes
        if progress:
            progress(result.raw_bytes, result.count)
        if size >= part_bytes:
            state.commit(index, count, False, pending)
            pending, size = {}, 0
    state.commit(index, count, True, pending)


# --- the finished folder --------------------------------------------------------------------


def _assemble(
    state: _State, sources: list[Source], job: Job, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Concatenate the parts into one pair per split and subset, and write the manifest."""
    out = state.out
    keys = sorted({(split, subset) for part in state.parts for split, subset, _ in part["entries"]})
    if not keys:
        raise DataError(
            f"no usable document in {len(sources)} source(s)"
            + (f"; the first problem: {state.shown[0]}" if state.shown else "")
        )
    dtype = token_type(tokenizer.vocabulary_size)
    entries = [_assemble_one(state, key, dtype) for key in keys]
    suffix = ".json" if job.tokenizer_path.suffix == ".json" else ".model"
    tokenizer_file = f"tokenizer{suffix}"
    source_file = job.tokenizer_path
    if source_file.is_dir():
        source_file = next(source_file.glob("tokenizer.*"))
        tokenizer_file = source_file.name
    if source_file.resolve() != (out / tokenizer_file).resolve():
        shutil.copyfile(source_file, out / tokenizer_file)
    described = [
        {
            "name": source.name,
            "size": source.size,
            "sha256": sha256_of(Path(source.name)) if source.size else None,
        }
        for source in sources
    ]
    manifest = manifest_values(
        tokenizer_file, tokenizer, dtype.__name__, entries, state.problems, described,
        state.identity,
    )  # fmt: skip
    write_aside(out / MANIFEST, json.dumps(manifest, indent=1).encode())
    shutil.rmtree(state.folder)
    return manifest


def _assemble_one(state: _State, key: Key, dtype: Any) -> dict[str, Any]:
    split, subset = key
    prefix = f"{split}/{_slug(subset)}"
    target = state.out / prefix
    target.parent.mkdir(parents=True, exist_ok=True)
    lengths: list[np.ndarray] = []
    documents: list[np.ndarray] = []
    checksums = Checksums()
    aside = target.with_name(target.name + ".bin.tmp")
    with aside.open("wb") as file:
        for part in state.parts:
            for one, other, number in part["entries"]:
                if (one, other) == key:
                    stem = state.folder / part["folder"] / str(number)
                    with stem.with_suffix(".bin").open("rb") as source:
                        while piece := source.read(1 << 20):
                            file.write(piece)
                            checksums.update(piece)
                    lengths.append(np.fromfile(stem.with_suffix(".len"), dtype=np.int32))
                    documents.append(np.fromfile(stem.with_suffix(".doc"), dtype=DOCUMENT_TYPE))
        _sync(file)
    all_lengths, all_documents = np.concatenate(lengths), np.concatenate(documents)
    index = target.with_name(target.name + ".idx.tmp")
    write_index(index, all_lengths, dtype)
    np.save(target.with_name(target.name + ".docs.npy"), all_documents)
    data = target.with_name(target.name + ".bin")
    os.replace(aside, data)
    os.replace(index, target.with_name(target.name + ".idx"))
    checksums.write_beside(data)
    return {
        "split": split,
        "subset": subset,
        "prefix": prefix,
        "documents": len(all_documents),
        "tokens": int(all_lengths.sum()),
        "bytes": int(all_documents["bytes"].sum()),
    }


def _slug(subset: str) -> str:
    slug = re.sub(r"[^A-Za-z0-9]+", "_", subset).strip("_")
    if not slug or slug != subset.replace(" ", "_").replace("-", "_"):
        slug += "_" + hashlib.sha256(subset.encode()).hexdigest()[:6]
    return slug


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
