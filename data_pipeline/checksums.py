"""Checksums of tokens on disk: a bit that flips there would otherwise train the model.

Beside ``PREFIX.bin`` lies ``PREFIX.crc``: the CRC-32 of every 64 KiB (little-endian uint32). A
block is checked when a sample first touches it, which costs a read of the block, once.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files import write_aside
from data_pipeline.sources import DataError

BLOCK = 1 << 16
SUFFIX = ".crc"


class Checksums:
    """CRC-32 of each block of a stream, however it is cut on its way."""

    def __init__(self) -> None:
        self._found: list[int] = []
        self._size = 0

    def update(self, data: bytes) -> None:
        """What comes next."""
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

    def write_beside(self, data: Path) -> None:
        """Write them beside the ``.bin`` that they are of."""
        write_aside(data.with_suffix(SUFFIX), self.values().tobytes())


def checksums_of(data: Path) -> np.ndarray:
    """CRC-32 of each block of a file, ``[blocks]`` uint32."""
    found = Checksums()
    with data.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.values()


def read_checksums(data: Path) -> np.ndarray | None:
    """The checksums beside a ``.bin``, or None where there are none.

    Raises:
        DataError: if they are not of a file of that size.
    """
    path = data.with_suffix(SUFFIX)
    if not path.is_file():
        return None
    found = np.fromfile(path, dtype="<u4")
    if len(found) != -(-data.stat().st_size // BLOCK) or path.stat().st_size % 4:
        raise DataError(f"{path}: not the checksums of {data.name}; tokenise again")
    return found


class CheckedReader:
    """Megatron's reader of a ``.bin``, each block checked when it is first read."""

    def __init__(self, reader: Any, data: Path, checksums: np.ndarray) -> None:
        self._reader, self._data, self._checksums = reader, data, checksums
        self._done = np.zeros(len(checksums), dtype=bool)
        self._file = os.open(data, os.O_RDONLY)

    def read(self, dtype: Any, count: int, offset: int) -> Any:
        """``count`` elements from byte ``offset`` on.

        Raises:
            DataError: naming the file and the block that is not as it was written.
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
            # Perhaps the bit flipped in memory: have the system forget its copy.
            os.posix_fadvise(self._file, block * BLOCK, BLOCK, os.POSIX_FADV_DONTNEED)
        found = os.pread(self._file, BLOCK, block * BLOCK)
        return zlib.crc32(found) == self._checksums[block]

    def __del__(self) -> None:
        os.close(self._file)


def _damage(data: Path, block: int) -> str:
    return (
        f"{data}: damaged between bytes {block * BLOCK} and {(block + 1) * BLOCK} (its checksum "
        "differs); bring the file back from a copy or tokenise again, then start again: the run "
        "goes on from its last checkpoint"
    )


def check_folder(folder: Path, progress: Callable[[int, int], None]) -> tuple[list[str], int]:
    """Check every ``.bin`` of a tokenised folder, whole.

    Args:
        progress: told (bytes done, bytes in all).

    Returns:
        (one line for each damaged file, number of files without checksums).
    """
    files = sorted(folder.rglob("*.bin"))
    total, done, without = sum(one.stat().st_size for one in files), 0, 0
    damaged = []
    for file in files:
        wanted = read_checksums(file)
        if wanted is None:
            without += 1
        else:
            wrong = np.flatnonzero(checksums_of(file) != wanted)
            if len(wrong):
                more = f" (and {len(wrong) - 1} more blocks)" if len(wrong) > 1 else ""
                damaged.append(_damage(file, int(wrong[0])) + more)
        done += file.stat().st_size
        progress(done, total)
    return damaged, without
