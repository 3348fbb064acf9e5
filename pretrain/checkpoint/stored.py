"""The tensors in a checkpoint's files: where their elements are, and reading some of them.

A file is hashed when something of it is first read, so that changed bytes are never used.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from data_pipeline.disk import NO_SUCH, NotRegularError, count, open_regular, patiently
from pretrain.checkpoint.manifest import MANIFEST, DamagedError, damaged, unreadable
from pretrain.checkpoint.tensor_file import TensorFile
from pretrain.errors import RunError

_BLOCK = 8 << 20
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Place:
    """Where some elements of a local shard are stored."""

    file: str
    tensor_rank: int
    offset: int
    numel: int


class StoredTensors:
    """The files of one checkpoint.

    Args:
        path: its folder.
        files: of its manifest, by name.
    """

    def __init__(self, path: Path, files: dict[str, Any]) -> None:
        self._path, self.files = path, files
        self.places: dict[str, dict[str, list[_Place]]] = {}
        """By the parameter's name and the key of the stored tensor."""
        for file, entry in files.items():
            for name, (offset, numel, keys) in entry["fragments"].items():
                place = _Place(file, entry["tensor_rank"], offset, numel)
                by_key = self.places.setdefault(name, {})
                for key in keys:
                    by_key.setdefault(key, []).append(place)
        self._known: dict[str, TensorFile] = {}
        self._trusted = False

    def trust(self) -> None:
        """Do not hash files again, because `problem` has just done so."""
        self._trusted = True

    def problem(self, part: int = 0, parts: int = 1) -> str:
        """One line about what is wrong with the files; empty if all are unchanged.

        Args:
            part, parts: check every ``parts``-th file from ``part`` on, so that processes divide
                the reading of a large checkpoint.
        """
        for file in sorted(self.files)[part::parts]:
            try:
                self._file(file)
            except DamagedError as error:
                return str(error)
        return ""

    def check(self, name: str, key: str) -> None:
        """Check the files that hold a tensor.

        Raises:
            DamagedError, UnreadableError: as `Checkpoint`.
        """
        for place in self.places.get(name, {}).get(key, ()):
            self._file(place.file)

    def whole(self, name: str, key: str, tensor_rank: int, shape: list[int]) -> Tensor:
        """A stored shard in its shape."""
        numel = int(torch.Size(shape).numel())
        return self.region(name, key, tensor_rank, 0, numel).view(shape)

    def region(self, name: str, key: str, tensor_rank: int, low: int, high: int) -> Tensor:
        """Elements ``low`` to ``high`` of a stored shard, flat float32.

        Raises:
            RunError: if some of them are stored nowhere.
        """
        places = [
            place
            for place in self.places.get(name, {}).get(key, ())
            if place.tensor_rank == tensor_rank
            and place.offset < high
            and place.offset + place.numel > low
        ]
        files = [self._file(place.file) for place in places]  # before memory is allocated
        flat = torch.empty(high - low)
        filled = 0
        for place, file in zip(places, files, strict=True):
            first, last = max(low, place.offset), min(high, place.offset + place.numel)
            into = flat[first - low : last - low]
            skipped, of = first - place.offset, place.numel
            self._read(place.file, partial(file.read_into, f"{name}/{key}", into, skipped, of))
            filled += last - first
        if filled != high - low:
            raise RunError(f"{self._path}: {name} ({key}) is incomplete: {filled}/{high - low}")
        return flat

    def tensor(self, file: str, name: str) -> Tensor | None:
        """A whole tensor of one file, if the checkpoint has the file."""
        if file not in self.files:
            return None
        opened = self._file(file)
        tensor: Tensor = self._read(file, lambda: opened.get_tensor(name))
        return tensor

    def _file(self, name: str) -> TensorFile:
        """Open a file after checking that it is unchanged."""
        if name not in self._known:
            self._known[name] = self._read(name, lambda: self._checked(name))
        return self._known[name]

    def _checked(self, name: str) -> TensorFile:
        path, entry = self._path / name, self.files[name]
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size != entry["size"]:
                raise ValueError("its size differs")
            if not self._trusted and _sha256(file) != entry["sha256"]:
                raise ValueError("its checksum differs")
        return TensorFile(path)

    def _read(self, name: str, action: Callable[[], Result]) -> Result:
        """Call an action that reads a file, and return its result.

        Raises:
            DamagedError: if the file is missing or wrong although the manifest exists.
            UnreadableError: if the disk does not respond, or has lost the whole folder.
        """
        path = self._path / name
        try:
            return patiently(action, NO_SUCH - {errno.ENOENT})
        except NotRegularError:
            raise damaged(path, "not a regular file") from None
        except OSError as error:
            if error.errno in NO_SUCH and (self._path / MANIFEST).is_file():
                raise damaged(path, str(error.strerror)) from None
            raise unreadable(path, error) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(path, str(error).splitlines()[0] or type(error).__name__) from None


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
        count(len(block))
    return digest.hexdigest()
