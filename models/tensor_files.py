"""Lists and reads the tensors in the files of a model from elsewhere.

Nothing in these files is executed: from safetensors and ``pytorch_model.bin`` (weights only), only
tensors are loaded.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.roles import ModelError

# In the order in which transformers looks for them: a single file before an index of shards.
_FORMS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_LARGEST_JSON = 1 << 25
"""Bytes; the index of a model of a trillion parameters takes some 10 MB."""
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Types in which weights are numbers; any other holds codes of a quantiser."""


class TensorFiles:
    """The tensors of a folder of weights, read by name on demand."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        """
        Args:
            say: called with a message for files that are not read, or read in a worse way.

        Raises:
            ModelError: naming the file that is missing, damaged, or inconsistent with another.
        """
        self.folder, self._say = folder, say
        self._name, self._legacy = "", False
        self._handle: Any = None
        self._where = self._list()

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""
        return sorted(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without its values."""
        entry = self._look(name)
        return tuple(entry.shape if isinstance(entry, Tensor) else entry.get_shape())

    def dtype(self, name: str) -> str:
        """The type of a tensor's values as safetensors names it, such as BF16, I8 or F8_E4M3."""
        entry = self._look(name)
        if not isinstance(entry, Tensor):
            return str(entry.get_dtype())
        return _NAMES.get(entry.dtype, str(entry.dtype).removeprefix("torch."))

    def read(self, name: str) -> Tensor:
        """One tensor, in the file's dtype; only its file is open, until the next one is needed.

        Raises:
            ModelError: naming a file that is missing or damaged, or a tensor that holds no numbers
                of 16 bits or more.
        """
        where, kind = self.folder / self._where[name], self.dtype(name)
        if kind not in _NAMES.values():
            raise ModelError(
                f"{where}: {name} is stored as {kind}, as quantised weights are; use the model in "
                "bfloat16, float16 or float32"
            )
        tensor: Tensor = self._look(name, whole=True)
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ModelError(f"{where}: {name} is larger than its data in the file")
        return tensor

    def close(self) -> None:
        """Close the open file and release the memory of its pages."""
        self._name, self._handle = "", None

    def _look(self, name: str, whole: bool = False) -> Any:
        """A tensor, or an object that has its shape and type."""
        file = self._where[name]
        try:
            handle = self._open(file)
            if isinstance(handle, dict):
                return handle[name]
            return handle.get_tensor(name) if whole else handle.get_slice(name)
        except Exception as error:
            raise ModelError(f"{self.folder / file}: {first_line(error)}") from None

    def _list(self) -> dict[str, str]:
        present = [name for name in _FORMS if (self.folder / name).is_file()]
        if present:
            chosen = present[0]
            if chosen == "model.safetensors" and "model.safetensors.index.json" in present:
                self._say(
                    f"{self.folder}: has model.safetensors and an index of shards; the single file "
                    "is read, as in transformers"
                )
            return self._indexed(chosen) if chosen.endswith(".json") else self._names([chosen])
        shards = sorted(path.name for path in self.folder.glob("*.safetensors") if path.is_file())
        if not shards:
            raise ModelError(f"{self.folder}: {_without_weights(self.folder)}")
        _check_count(self.folder, shards)
        return self._names(shards)

    def _names(self, files: list[str]) -> dict[str, str]:
        """The names in the headers of some files."""
        where: dict[str, str] = {}
        for file in files:
            try:
                names = list(self._open(file).keys())
            except Exception as error:
                raise ModelError(f"{self.folder / file}: {first_line(error)}") from None
            for name in names:
                if name in where:
                    raise ModelError(
                        f"{self.folder}: {name} is in {where[name]} and in {file}; remove the file "
                        "that is not of this model"
                    )
                where[name] = file
        return where

    def _indexed(self, index: str) -> dict[str, str]:
        """The entries of an index, checked against the headers of its shards."""
        path = self.folder / index
        listed = read_json(path).get("weight_map")
        if not isinstance(listed, dict) or not all(
            isinstance(file, str) for file in listed.values()
        ):
            raise ModelError(f"{path}: damaged (no weight_map)")
        outside = [file for file in listed.values() if Path(file).name != file]
        if outside:
            raise ModelError(f"{path}: {outside[0]} is not in the folder")
        files = sorted(set(listed.values()))
        missing = [file for file in files if not (self.folder / file).exists()]
        if missing:
            raise ModelError(
                f"{self.folder / missing[0]}: No such file; {index} names it ({len(missing)} of "
                f"{len(files)} shards are missing)"
            )
        stored = self._names(files)
        wrong = [name for name in {**listed, **stored} if listed.get(name) != stored.get(name)]
        if wrong:
            name = wrong[0]
            places = listed.get(name, "no shard"), stored.get(name, "no shard")
            raise ModelError(
                f"{path}: says that {name} is in {places[0]}, but it is in {places[1]}; the index "
                "does not belong to these shards; download or save the model again"
            )
        return stored

    def _open(self, file: str) -> Any:
        if self._name != file:
            self._name = ""
            self._handle = None  # before the next one is opened: memory may not hold two shards
            path = self.folder / file
            if not path.is_file():
                raise FileNotFoundError(2, "No such file")
            if file.endswith(".safetensors"):
                from safetensors import safe_open

                self._handle = safe_open(path, framework="pt")
            else:
                self._handle = self._load(path)
            self._name = file
        return self._handle

    def _load(self, path: Path) -> Any:
        _check_archive(path)
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            if not self._legacy:
                self._say(f"{path}: written before torch 1.6, so it is read whole into memory")
                self._legacy = True
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict):
            raise ValueError("not a mapping of names to tensors")
        wrong = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
        if wrong:
            raise ValueError(f"{wrong[0]} in it is not a tensor")
        return tensors


def _check_count(folder: Path, shards: list[str]) -> None:
    """Shards without an index, whose names say how many there are, must all exist."""
    for shard in shards:
        match = _NUMBERED.fullmatch(shard)
        if match is None:
            continue
        stem, _, count, kind = match.groups()
        for number in range(1, min(int(count), len(shards) + 1) + 1):
            wanted = f"{stem}-{number:05d}-of-{count}.{kind}"
            if wanted not in shards:
                raise ModelError(f"{folder / wanted}: No such file, although {shard} exists")


def _check_archive(path: Path) -> None:
    """Refuse a zip with compressed entries, which torch never writes and which could expand."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            packed = [
                member
                for member in archive.infolist()
                if member.compress_type != zipfile.ZIP_STORED
            ]
        if packed:
            raise ValueError(f"{packed[0].filename} in it is compressed, which torch never does")


def _without_weights(folder: Path) -> str:
    if any(folder.glob("*.gguf")):
        return (
            "has a GGUF file, which is quantised or only for llama.cpp; use the model that it was "
            "made from, as safetensors"
        )
    if (folder / "qmodel.pt").exists():
        return "has an HQQ model, which is quantised; use the model that it was made from"
    return "no weights (model.safetensors, pytorch_model.bin, or an index of shards)"


def first_line(error: Exception) -> str:
    """A readable description of what is wrong with a file."""
    if isinstance(error, pickle.UnpicklingError):
        return "contains more than tensors, which is not loaded from foreign files"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip().splitlines()
    return f"damaged ({text[0] if text else type(error).__name__})"


def read_json(path: Path) -> dict[str, Any]:
    """A mapping in a JSON file.

    Raises:
        ModelError: one line naming the file.
    """
    try:
        # Reading a pipe would wait, and a device has no end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ModelError(f"{path}: not a regular file")
            if size > _LARGEST_JSON:
                raise ModelError(f"{path}: larger than {_LARGEST_JSON >> 20} MB, so it is not read")
            content = json.loads(file.read(size))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: damaged (not JSON)") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: damaged (not a mapping)")
    return content
