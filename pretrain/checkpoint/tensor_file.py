"""Safetensors files for checkpoints: written without stopping training, read without copies.

`safetensors.torch.save_file` first copies every tensor into Python bytes while it holds the
interpreter's lock, which stops a training thread. The format is a header and the bytes themselves
(https://huggingface.co/docs/safetensors). Here the bytes are written in blocks from where they are,
and each block is hashed, both without the lock. Reading goes directly into the destination tensor,
without mapped pages and without a second copy, so that an export holds only one layer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.disk import count, open_regular

_NAMES = {torch.float32: "F32", torch.uint8: "U8", torch.bfloat16: "BF16", torch.float64: "F64"}
_BLOCK = 8 << 20
_SYNC_EVERY = 32
"""Number of blocks after which to wait for the disk; what it has written is visible progress."""


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> tuple[int, str]:
    """Write contiguous CPU tensors and sync the file.

    Returns:
        Size in bytes, and SHA-256 of the intended contents.

    Raises:
        OSError: the disk's error.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    # Larger elements first, so that each tensor starts at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, value in ordered:
        end = offset + value.nbytes
        header[name] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o666), "wb", buffering=0) as file:
            for number, block in enumerate(_blocks(text, [value for _, value in ordered]), 1):
                _write(file.fileno(), block)
                digest.update(block)
                if number % _SYNC_EVERY == 0:
                    os.fdatasync(file.fileno())
                count(len(block))
            os.fsync(file.fileno())
    except OSError as error:  # an error of a descriptor does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from None
    return 8 + len(text) + offset, digest.hexdigest()


def _blocks(header: bytes, tensors: list[Tensor]) -> Iterator[memoryview]:
    """The pieces of the file, without copying the tensors."""
    yield memoryview(len(header).to_bytes(8, "little"))
    yield memoryview(header)
    for value in tensors:
        flat: Any = value.detach().contiguous().view(-1).view(torch.uint8).numpy()
        whole = memoryview(flat).cast("B")
        for start in range(0, len(whole), _BLOCK):
            yield whole[start : start + _BLOCK]


def _write(descriptor: int, block: memoryview) -> None:
    """Write a whole block; the system may accept only a part at a time."""
    while block:
        block = block[os.write(descriptor, block) :]


class TensorFile:
    """A safetensors file that is read tensor by tensor into the caller's memory.

    The file is open only during a read, because a checkpoint may have more files than a process may
    open.

    Raises:
        ValueError: if the file is not a safetensors file, or is truncated.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError(f"{path}: not a safetensors file")
            self._header: dict[str, Any] = json.loads(file.read(length))
        self._header.pop("__metadata__", None)
        self._start = 8 + length
        if any(entry["data_offsets"][1] > size - self._start for entry in self._header.values()):
            raise ValueError(f"{path}: truncated")

    def read_into(self, name: str, flat: Tensor, low: int = 0, numel: int | None = None) -> None:
        """Fill a flat contiguous CPU tensor with elements of a stored one of the same type.

        Args:
            low: the first stored element to read.
            numel: number of elements that must be stored. Default: those of ``flat``.
        """
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        width = flat.element_size()
        stored = (flat.numel() if numel is None else numel) * width
        if entry["dtype"] != _NAMES[flat.dtype] or end - begin != stored:
            raise ValueError(f"{name}: {entry['dtype']} of {end - begin} bytes")
        begin += low * width
        bytes_of: Any = flat.view(torch.uint8).numpy()
        view = memoryview(bytes_of).cast("B")
        with open_regular(self._path) as file:
            file.seek(self._start + begin)
            while view:
                length = file.readinto(view[:_BLOCK])  # type: ignore[attr-defined]
                if not length:
                    raise ValueError(f"{name}: truncated")
                count(length)
                view = view[length:]

    def get_tensor(self, name: str) -> Tensor:
        """A stored tensor."""
        entry = self._header[name]
        dtype = next(dtype for dtype, code in _NAMES.items() if code == entry["dtype"])
        tensor = torch.empty(entry["shape"], dtype=dtype)
        self.read_into(name, tensor.view(-1))
        return tensor
