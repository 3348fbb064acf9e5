"""Reads files in blocks of records: lines, plain or compressed, and whole texts (not parquet).

Memory is bounded whatever the size of the unpacked file: archives are unpacked in small pieces, and
a record that is longer than `RECORD_BYTES` is reported and skipped.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.records import (
    RECORD_BYTES,
    ChoiceError,
    DataError,
    RecordBlock,
    Unreadable,
    WholeText,
)

BLOCK_BYTES = 4 << 20
_PIECE = 1 << 20
_ZST_PIECE = 1 << 12
"""Bytes of zstd that are unpacked at a time: four may become 128 KiB, so these may become 128
MiB."""
_GZ_PIECE = 1 << 17
WINDOW_MB = 512
"""Memory that a zstd frame may request, unless more is allowed."""


def line_blocks(
    path: Path, window_mb: int = WINDOW_MB, block_bytes: int = BLOCK_BYTES
) -> Iterator[RecordBlock]:
    """Blocks of the lines of a file, compressed or not.

    Args:
        block_bytes: a block ends after the line that fills it.

    Raises:
        DataError: naming an archive that is damaged, truncated, or needs more memory.
    """
    lines: list[Any] = []
    size, first = 0, 1
    for number, line in enumerate(split_lines(_chunks(path, window_mb)), 1):
        lines.append(line)
        size += 1 + (len(line) if isinstance(line, bytes) else 0)
        if size >= block_bytes:
            yield RecordBlock(str(path), first, lines)
            lines, size, first = [], 0, number + 1
    if lines:
        yield RecordBlock(str(path), first, lines)


def split_lines(chunks: Iterator[bytes], most: int = RECORD_BYTES) -> Iterator[bytes | Unreadable]:
    """Lines without their line ends, in time that is linear in their length.

    Args:
        most: bytes of the longest line that is kept.
    """
    pieces: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        for start in [first, *others[:-1]] if others else []:
            yield _joined(pieces, start, size, most)
            pieces, size = [], 0
        last = others[-1] if others else first
        size += len(last)
        if size <= most:
            pieces.append(last)
        else:
            pieces = []  # too long: only its length is kept
    if size:
        yield _joined(pieces, b"", size, most)


def _joined(pieces: list[bytes], end: bytes, size: int, most: int) -> bytes | Unreadable:
    if size + len(end) > most:
        return too_long(size + len(end), most)
    return b"".join([*pieces, end]) if pieces else end


def too_long(size: int, most: int = RECORD_BYTES) -> Unreadable:
    """The placeholder of a record that is too long to read."""
    return Unreadable(
        f"{size >> 20:,} MB in one record; the limit is {most >> 20} MB, split the record"
    )


def text_blocks(path: Path) -> Iterator[RecordBlock]:
    """A whole ``.txt`` file; its folder is its subset."""
    with path.open("rb") as file:
        data = file.read(RECORD_BYTES + 1)
    if len(data) > RECORD_BYTES:
        yield RecordBlock(str(path), 1, [too_long(path.stat().st_size)])
    elif data:
        yield RecordBlock(str(path), 1, [WholeText(data, path.parent.name or "text")])


# --- archives -------------------------------------------------------------------------------


def _chunks(path: Path, window_mb: int) -> Iterator[bytes]:
    """Unpacked bytes; a truncated or damaged archive is an error that names it."""
    name = path.name.lower()
    if name.endswith(".zst"):
        for output in _zst_chunks(path, window_mb):
            for start in range(0, len(output), _PIECE):
                yield output[start : start + _PIECE]
        return
    if name.endswith(".gz"):
        try:
            yield from _gz_chunks(path)
        except (EOFError, zlib.error) as error:
            raise damaged(path, error) from None
        return
    with path.open("rb") as file:
        while chunk := file.read(_PIECE):
            yield chunk


def _gz_chunks(path: Path) -> Iterator[bytes]:
    """Unpacked bytes of all members; zeros after a member are padding.

    Python's gzip skips padding byte by byte: a file that was allocated in advance takes hours.

    Raises:
        EOFError, zlib.error: if it is cut or damaged.
    """
    member, is_first = None, True
    with path.open("rb") as file:
        while data := file.read(_GZ_PIECE):
            output = b""
            while data or len(output) == _PIECE:
                if member is None:
                    data = data if is_first else _without_padding(data)
                    if not data:
                        break
                    member, is_first = zlib.decompressobj(wbits=31), False  # gzip's header
                output = member.decompress(data, _PIECE)
                if output:
                    yield output
                if member.eof:
                    data, output, member = member.unused_data, b"", None
                else:
                    data = member.unconsumed_tail
    if member is not None:
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")


def _without_padding(data: bytes) -> bytes:
    """Bytes without zeros at their beginning, which are mostly all of them or none."""
    return b"" if data == bytes(len(data)) else data.lstrip(b"\0")


def _zst_chunks(path: Path, window_mb: int) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=max(1, window_mb) << 20)
    frame = decompressor.decompressobj()
    head = b""
    """The frame's first bytes, which contain its header."""
    with path.open("rb") as file:
        while data := file.read(_ZST_PIECE):
            while data:
                head = (head + data)[:18]
                try:
                    output = frame.decompress(data)
                except (zstandard.ZstdError, MemoryError) as error:
                    raise _zst_error(path, error, head, window_mb) from None
                if output:
                    yield output
                data = b""
                if frame.eof:  # an archive may be several frames, one after the other
                    data, head = frame.unused_data, b""
                    frame = decompressor.decompressobj()
    if head:
        raise damaged(path, "it ends inside a frame")


def _zst_error(path: Path, error: Exception, head: bytes, window_mb: int) -> DataError:
    import zstandard

    try:
        wanted = -(-zstandard.get_frame_parameters(head).window_size // (1 << 20))
    except zstandard.ZstdError:
        wanted = 0
    if wanted > window_mb:
        return ChoiceError(
            f"{path}: was compressed with a window of {wanted:,} MB, but only {window_mb:,} MB are "
            f"allowed; use --zst-window-mb {wanted} if the machine has that much free memory"
        )
    return damaged(path, error)


def damaged(path: Path, reason: object) -> DataError:
    """The error for a file whose bytes do not follow its format."""
    text = " ".join(str(reason).split())[:200] or type(reason).__name__
    return DataError(
        f"{path}: the file is truncated or damaged ({text}); download it again, then rerun the "
        "command: finished files are kept"
    )
