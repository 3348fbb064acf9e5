"""Encodes blocks of records to token ids, in this process or in a pool, in order.

Workers parse and encode; they return arrays, never lists of tokens.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from data_pipeline.account import Account, account_of
from data_pipeline.children import leave_signals_to_parent, signals_held_back
from data_pipeline.json_tokenizer import NO_SPECIAL_TOKENS, SpecialTokens
from data_pipeline.records import (
    SHARES,
    DataError,
    Fields,
    RecordBlock,
    parse_block,
    split_by_document,
)
from data_pipeline.tokenizer import Tokenizer, load_tokenizer

DOCUMENT_TYPE = np.dtype([("bytes", "<u8"), ("hash", "<u8")])
"""A file beside each pair, with one entry per document: UTF-8 bytes and a hash of the text."""
Key = tuple[str, str]
"""(split, subset)"""
_WAIT = 5.0
"""Seconds between two checks of a worker."""
_GRACE = 2.0
"""Seconds in which this process handles a signal that its workers received as well."""


@dataclass
class Encoded:
    """Documents of one split and subset: their concatenated tokens, and their lengths."""

    tokens: list[np.ndarray] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)
    documents: list[np.ndarray] = field(default_factory=list)

    def extend(self, other: Encoded) -> None:
        """Append the documents of another batch."""
        self.tokens += other.tokens
        self.lengths += other.lengths
        self.documents += other.documents


@dataclass(frozen=True)
class EncodingSettings:
    """The settings apart from the sources; their identity decides whether a folder matches."""

    tokenizer_path: Path
    eod_token: str | None = None
    fields: Fields = Fields()
    split: str | None = None
    """Put everything in this split; None: by name, else by document."""
    strict: bool = False
    special: SpecialTokens = NO_SPECIAL_TOKENS
    lossless: bool = False
    """Stop at a document that the tokenizer does not reproduce."""
    shares: tuple[int, int, int] = SHARES
    """Percents of train, val and test, where documents are divided."""

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer, set as asked."""
        return load_tokenizer(self.tokenizer_path, self.eod_token, self.special)


@dataclass
class Result:
    encoded: dict[Key, Encoded]
    problems: list[str]
    bytes: int
    raw_bytes: int
    count: int
    """Documents."""
    account: Account


def token_type(vocabulary_size: int) -> type[np.uint16] | type[np.int32]:
    """Megatron's choice: 16 bits if the largest id allows it."""
    return np.uint16 if vocabulary_size < 65_500 else np.int32


def _encode_block(
    tokenizer: Tokenizer, block: RecordBlock, settings: EncodingSettings, split: str | None
) -> Result:
    parsed = parse_block(block, settings.fields)
    texts = [document.text for document in parsed.documents]
    ids = tokenizer.encode(texts)
    end = np.array([tokenizer.eod])
    members: dict[Key, list[int]] = {}
    for number, document in enumerate(parsed.documents):
        dealt = split or split_by_document(document.text, settings.shares)
        key = (dealt, document.subset)
        members.setdefault(key, []).append(number)
    encoded = {}
    for key, numbers in members.items():
        raw = [texts[number].encode("utf-8") for number in numbers]
        encoded[key] = Encoded(
            [_stored([part for n in numbers for part in (ids[n], end)], tokenizer)],
            [np.array([len(ids[n]) + 1 for n in numbers], dtype=np.int32)],
            [np.array([(len(text), hash_text(text)) for text in raw], dtype=DOCUMENT_TYPE)],
        )
    total = sum(int(arrays.documents[0]["bytes"].sum()) for arrays in encoded.values())
    raw_bytes = sum(len(record) for record in block.records if isinstance(record, bytes)) or total
    account = account_of(tokenizer, texts, ids)
    return Result(encoded, parsed.problems, total, raw_bytes, len(texts), account)


def _stored(parts: list[np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    """Ids in the type in which they are written, without overflow.

    Raises:
        DataError: for an id that the tokenizer should not have.
    """
    joined, size = np.concatenate(parts), tokenizer.vocabulary_size
    if joined.min() < 0 or joined.max() >= size:
        culprit = joined.min() if joined.min() < 0 else joined.max()
        raise DataError(f"the tokenizer made token {culprit}, but its largest id is {size - 1}")
    return joined.astype(token_type(size))


def hash_text(text: bytes) -> int:
    """A key that orders documents in samples, the same for every tokenizer."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class Encoder:
    """Encodes blocks in order, in this process or in a pool with bounded read-ahead.

    Args:
        wait: called every few seconds while a worker has not finished.
    """

    def __init__(
        self,
        settings: EncodingSettings,
        tokenizer: Tokenizer,
        workers: int,
        wait: Callable[[], None],
    ) -> None:
        self.settings, self.tokenizer, self.workers, self.wait = settings, tokenizer, workers, wait
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Callable[[Iterator[tuple[RecordBlock, str | None]]], Iterator[Result]]:
        if self.workers <= 1:
            return self._serial
        with signals_held_back(workers=True):  # it starts a process that tracks its semaphores
            self.pool = ProcessPoolExecutor(
                self.workers,
                mp_context=get_context("spawn"),
                initializer=_start_worker,
                initargs=(self.settings, os.getpid()),
            )
        return self._parallel

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def _serial(self, blocks: Iterator[tuple[RecordBlock, str | None]]) -> Iterator[Result]:
        for block, split in blocks:
            yield _encode_block(self.tokenizer, block, self.settings, split)

    def _parallel(self, blocks: Iterator[tuple[RecordBlock, str | None]]) -> Iterator[Result]:
        assert self.pool is not None
        waiting: deque[Future[Result]] = deque()
        try:
            for block, split in blocks:
                with signals_held_back():  # it starts workers
                    future = self.pool.submit(_work, block, self.settings, split)
                waiting.append(future)
                if len(waiting) > 2 * self.workers:
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed, probably because memory ran out; rerun the command "
                f"with fewer than {self.workers} --workers: what was finished is kept"
            ) from None

    def _result(self, future: Future[Result]) -> Result:
        while True:
            try:
                return future.result(timeout=_WAIT)
            except TimeoutError:
                if future.done():
                    raise
                self.wait()


_worker: dict[str, Tokenizer] = {}


def _start_worker(settings: EncodingSettings, parent: int) -> None:
    leave_signals_to_parent(_GRACE)
    _worker["tokenizer"] = settings.open_tokenizer()

    def die_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()


def _work(block: RecordBlock, settings: EncodingSettings, split: str | None) -> Result:
    return _encode_block(_worker["tokenizer"], block, settings, split)
