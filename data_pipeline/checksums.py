"""Checksums of tokens on disk: otherwise the model would train on flipped bits.

``PREFIX.crc`` beside ``PREFIX.bin`` has the CRC-32 of every 64 KiB (little-endian uint32). A block
is checked when a sample first uses it, which costs one read of the block.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.index_file import read_header
from data_pipeline.manifest import Entry, Manifest, load_manifest
from data_pipeline.records import DataError
from data_pipeline.shared_indices import shared_arrays
from data_pipeline.sources import sha256_of, stamp_of

BLOCK = 1 << 16
SUFFIX = ".crc"


class Checksums:
    """CRC-32 of each block of a stream that arrives in pieces of any size."""

    def __init__(self) -> None:
        self._found: list[int] = []
        self._size = 0

    def update(self, data: bytes) -> None:
        """Add the next piece."""
        view = memoryview(data)
        while view:
            inside = self._size % BLOCK
            part = view[: BLOCK - inside]
            if inside:
                self._found[-1] = zlib.crc32(part, self._found[-1])
            else:
                self._found.append(zlib.crc32(part))
            self._size += len(part)
            view = view[len(part) :]

    def values(self) -> np.ndarray:
        """``[blocks]`` uint32."""
        return np.array(self._found, dtype="<u4")


def checksums_of(data: Path) -> np.ndarray:
    """CRC-32 of each block of a file, ``[blocks]`` uint32."""
    checksums = Checksums()
    with data.open("rb") as file:
        while part := file.read(1 << 20):
            checksums.update(part)
    return checksums.values()


def read_checksums(data: Path, path: Path | None = None) -> np.ndarray | None:
    """The checksums of a ``.bin``, or None if it has none.

    Args:
        path: the checksums' file; default: beside the ``.bin``.

    Raises:
        DataError: if they do not belong to a file of that size.
    """
    path = path or data.with_suffix(SUFFIX)
    if not path.is_file():
        return None
    if path.stat().st_size != 4 * -(-data.stat().st_size // BLOCK):
        raise DataError(f"{path}: not the checksums of {data.name}; tokenise again")
    return np.fromfile(path, dtype="<u4")


class CheckedReader:
    """Megatron's reader of a ``.bin`` that checks each block when it is first read."""

    def __init__(self, reader: Any, data: Path, checksums: np.ndarray) -> None:
        self._reader, self._data, self._checksums = reader, data, checksums
        self._done = np.zeros(len(checksums), dtype=bool)
        self._file = os.open(data, os.O_RDONLY)

    def read(self, dtype: Any, count: int, offset: int) -> Any:
        """``count`` elements from byte ``offset`` on.

        Raises:
            DataError: naming the file and the block that has changed since it was written.
        """
        stop = offset + count * np.dtype(dtype).itemsize
        for block in range(offset // BLOCK, -(-stop // BLOCK)):
            if not self._done[block]:
                self._check(block)
        return self._reader.read(dtype=dtype, count=count, offset=offset)

    def _check(self, block: int) -> None:
        if self._is_whole(block) or self._is_whole(block, fresh=True):
            self._done[block] = True
            return
        raise DataError(_damage(self._data, block))

    def _is_whole(self, block: int, fresh: bool = False) -> bool:
        if fresh and hasattr(os, "posix_fadvise"):
            # The bit may have flipped in memory: make the system drop its cached copy.
            os.posix_fadvise(self._file, block * BLOCK, BLOCK, os.POSIX_FADV_DONTNEED)
        data = os.pread(self._file, BLOCK, block * BLOCK)
        return bool(zlib.crc32(data) == self._checksums[block])

    def __del__(self) -> None:
        os.close(self._file)


def _damage(data: Path, block: int) -> str:
    return (
        f"{data}: damaged between bytes {block * BLOCK} and {(block + 1) * BLOCK} (its checksum "
        "differs); restore the file from a copy or tokenise again, then rerun the same command: "
        "the run continues from its last checkpoint"
    )


def verify(path: Path, files: dict[Path, str]) -> None:
    """Check that a file of a folder is unchanged; each state of a file is read once.

    Args:
        files: hashes of the folder's files; a file without one passes.

    Raises:
        DataError: naming the file, if it is missing or differs.
    """
    if path in files:
        if not path.is_file():
            raise DataError(f"{path}: missing; restore it from a copy or tokenise again")
        if _hash(path, stamp_of(path)) != files[path]:
            raise DataError(
                f"{path}: damaged (its checksum differs); restore it from a copy or tokenise again"
            )


@lru_cache(maxsize=4096)
def _hash(path: Path, stamp: tuple[int, int, int]) -> str:
    """The hash of one state of a file; a large file is read by one process of a machine.

    The index of 10¹² tokens has some 20 GB, and the processes of a cluster start together.
    """

    def read() -> tuple[np.ndarray]:
        return (np.frombuffer(bytes.fromhex(sha256_of(path)), dtype=np.uint8),)

    key = hashlib.sha256(f"{path.absolute()}/{stamp}".encode("utf-8", "surrogateescape"))
    (digest,) = shared_arrays(key.hexdigest()[:32], path.stat().st_size, read)
    return digest.tobytes().hex()


def load_documents(path: Path) -> np.ndarray:
    """Bytes and hash of each document of an entry, memory-mapped, so that no header can use memory.

    Raises:
        OSError, ValueError: if the file is missing, not a regular file or incomplete.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        documents: np.ndarray = np.load(path, allow_pickle=False, mmap_mode="r")
    except EOFError:
        raise ValueError("the file is empty") from None
    return documents


def check_folder(
    folder: Path, progress: Callable[[int, int], None], workers: int = 1
) -> tuple[list[str], int]:
    """Compare every file of a tokenised folder with its entry in the manifest.

    Args:
        progress: called with (bytes done, bytes in total).
        workers: files that are read at once; a file of tokens is read twice.

    Returns:
        (one line for each thing that is wrong, number of files of tokens without checksums).

    Raises:
        DataError: if the manifest itself cannot be used.
    """
    manifest = load_manifest(folder)
    wrong = _overlaps(manifest.entries)
    beside = {entry.path(".bin"): entry.checksum_file for entry in manifest.entries}
    files = sorted({*manifest.files, *beside})
    sizes = {path: path.stat().st_size if path.is_file() else 0 for path in files}
    without: list[Path] = []

    def compare_blocks(file: Path) -> None:
        if not _check_blocks(file, beside[file]):
            without.append(file)

    jobs: list[tuple[Path, Callable[[], None]]] = [
        (file, partial(compare_blocks, file)) for file in files if file in beside
    ]
    jobs += [(file, partial(verify, file, manifest.files)) for file in files]
    problems = _problems(jobs, sizes, progress, workers)
    wrong += [problems[file] for file in files if file in problems]
    for entry in manifest.entries:
        wrong += _check_counts(entry, manifest)
    return wrong, len(without)


def _problems(
    jobs: list[tuple[Path, Callable[[], None]]],
    sizes: dict[Path, int],
    progress: Callable[[int, int], None],
    workers: int,
) -> dict[Path, str]:
    """The first thing that is wrong with each file, in the order of the jobs.

    Threads read at once, since hashing and reading leave the interpreter's lock.
    """
    total, done = sum(sizes[file] for file, _ in jobs), 0
    pool = ThreadPoolExecutor(workers)
    try:
        # The largest first, so that none of them remains alone at the end.
        order = sorted(range(len(jobs)), key=lambda number: -sizes[jobs[number][0]])
        numbers = {pool.submit(jobs[number][1]): number for number in order}
        found: dict[int, str] = {}
        for future in as_completed(numbers):
            number = numbers[future]
            try:
                future.result()
            except DataError as error:
                found[number] = str(error)
            done += sizes[jobs[number][0]]
            progress(done, total)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    problems: dict[Path, str] = {}
    for number in sorted(found):
        problems.setdefault(jobs[number][0], found[number])
    return problems


def _check_blocks(data: Path, checksums: Path) -> bool:
    """Read a whole ``.bin``, and return whether there are checksums to compare it with."""
    if not data.is_file():
        raise DataError(f"{data}: missing; restore it from a copy or tokenise again")
    wanted = read_checksums(data, checksums)
    if wanted is None:
        return False
    wrong = np.flatnonzero(checksums_of(data) != wanted)
    if len(wrong):
        more = f" (and {len(wrong) - 1} more blocks)" if len(wrong) > 1 else ""
        raise DataError(_damage(data, int(wrong[0])) + more)
    return True


def _overlaps(entries: Iterable[Entry]) -> list[str]:
    """Report two entries that use the same documents of one file: one of them must be wrong."""
    wrong = []
    by_file: dict[Path, list[Entry]] = {}
    for entry in entries:
        by_file.setdefault(entry.prefix, []).append(entry)
    for prefix, uses in by_file.items():
        ordered = sorted(uses, key=lambda use: use.first)
        for before, after in pairwise(ordered):
            if after.first < before.first + before.documents:
                wrong.append(
                    f"{prefix}: {before.split} {before.subset!r} and {after.split} "
                    f"{after.subset!r} use the same documents of a file; tokenise again"
                )
    return wrong


def _check_counts(entry: Entry, manifest: Manifest) -> list[str]:
    """Check that index, sizes and documents agree with the manifest."""
    index, data, documents = (entry.path(end) for end in (".idx", ".bin", ".docs.npy"))
    if entry.index:
        documents = manifest.path / entry.index
    wrong = []
    if not index.is_file():
        wrong.append(f"{index}: missing")
    else:
        with index.open("rb") as file:
            header = read_header(file)
        if header is None or header.file_size != index.stat().st_size:
            wrong.append(f"{index}: the index is damaged")
        elif header.sequences != (entry.file_documents or entry.documents):
            wrong.append(f"{index}: has {header.sequences} documents, not {entry.documents}")
    size = (entry.file_tokens or entry.tokens) * np.dtype(manifest.dtype).itemsize
    if data.is_file() and data.stat().st_size != size:
        wrong.append(f"{data}: {data.stat().st_size} bytes, not {size}")
    if entry.index or not entry.file_documents:
        wrong += _check_documents(documents, entry)
    return [f"{line}; restore it from a copy or tokenise again" for line in wrong]


def _check_documents(path: Path, entry: Entry) -> list[str]:
    try:
        documents = load_documents(path)
        counted = (len(documents), int(documents["bytes"].sum()))
    except (OSError, ValueError, IndexError):
        return [f"{path}: missing or damaged"]
    if counted != (entry.documents, entry.bytes):
        return [f"{path}: has {counted[0]} documents of {counted[1]} bytes"]
    return []
