"""Attention matrices of pretrained models, read from their files tensor by tensor.

No model is built and no code of the model's authors runs: ``config.json`` gives the heads,
`models.families` where the matrices lie, and safetensors (or ``pytorch_model.bin``, weights only)
hands over one tensor at a time.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.factors import AttentionShape, Factors
from models.families import EXAMPLE, Family, Tower, known_families
from models.roles import ModelError

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")


class TensorFiles:
    """The tensors of a folder of weights, by name, read on demand."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self._say = folder, say
        self._name, self._legacy = "", False
        self._handle: Any = None
        self._where = self._list()

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""
        return sorted(self._where)

    def read(self, name: str) -> Tensor:
        """One tensor, in the file's dtype; only its file is open, and only until the next one's.

        Raises:
            ModelError: naming a file that is missing or damaged.
        """
        file = self._where[name]
        try:
            handle = self._open(file)
            found = handle.get_tensor(name) if hasattr(handle, "get_tensor") else handle[name]
        except Exception as error:
            raise ModelError(f"{self.folder / file}: {_first_line(error)}") from None
        if not isinstance(found, Tensor):
            raise ModelError(f"{self.folder / file}: {name} is not a tensor")
        return found

    def close(self) -> None:
        """Let go of the open file, and of the memory that its pages take."""
        self._name, self._handle = "", None

    def _list(self) -> dict[str, str]:
        for name in _INDEXES:
            if (self.folder / name).is_file():
                where = _read_json(self.folder / name).get("weight_map")
                if not isinstance(where, dict):
                    raise ModelError(f"{self.folder / name}: damaged (no weight_map)")
                outside = [file for file in where.values() if Path(str(file)).name != file]
                if outside:
                    raise ModelError(f"{self.folder / name}: {outside[0]} is not in the folder")
                return where
        singles = [name for name in _SINGLES if (self.folder / name).is_file()]
        singles = singles[:1] or sorted(one.name for one in self.folder.glob("*.safetensors"))
        if not singles:
            raise ModelError(
                f"{self.folder}: no weights (model.safetensors, pytorch_model.bin, or an index of "
                "shards)"
            )
        where = {}
        for file in singles:
            try:
                where |= dict.fromkeys(self._open(file).keys(), file)
            except Exception as error:
                raise ModelError(f"{self.folder / file}: {_first_line(error)}") from None
        return where

    def _open(self, file: str) -> Any:
        if self._name != file:
            self._name = ""
            self._handle = None  # before the next is opened: two shards need not fit
            path = self.folder / file
            if file.endswith(".safetensors"):
                from safetensors import safe_open

                self._handle = safe_open(path, framework="pt")
            else:
                self._handle = self._load(path)
            self._name = file
        return self._handle

    def _load(self, path: Path) -> Any:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            if not self._legacy:
                self._say(f"{path}: written before torch 1.6, so it is read whole into memory")
                self._legacy = True
            return torch.load(path, map_location="cpu", weights_only=True)


def _first_line(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "holds more than tensors, which is not loaded from foreign files"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip().splitlines()
    return f"damaged ({text[0] if text else type(error).__name__})"


@dataclass(frozen=True)
class AttentionTower:
    """One stack of attention layers of a pretrained model."""

    name: str
    """Empty, or which of several (``text``, ``vision``)."""
    shape: AttentionShape
    files: TensorFiles
    tower: Tower

    def layers(self) -> Iterator[Factors]:
        """The factors of every layer, in order; at most one layer's weights are held."""
        for layer in range(self.shape.num_layers):
            yield self.layer(layer)

    def layer(self, layer: int) -> Factors:
        """The factors of one layer, in the file's dtype.

        Raises:
            ModelError: naming a tensor that is missing or of another shape than expected.
        """
        shape, tower = self.shape, self.tower
        rows = shape.num_attention_heads * shape.head_size
        shared = shape.key_value_heads * shape.head_size
        if tower.qkv:
            fused = self._matrix(layer, tower.qkv, rows + 2 * shared)
            query, key, value = self._split(fused, rows, shared)
        else:
            query = self._matrix(layer, tower.query, rows)
            key = self._matrix(layer, tower.key, shared)
            value = self._matrix(layer, tower.value, shared)
        output = self._matrix(layer, tower.output, shape.hidden_size, rows)
        self.files.close()
        return Factors.of_layer(shape, query, key, value, output)

    def _split(self, fused: Tensor, rows: int, shared: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.tower.order == "stacked":
            query, key, value = fused.split([rows, shared, shared])
            return query, key, value
        unit = fused.reshape(self.shape.key_value_heads, -1, fused.shape[-1])
        group = self.shape.group * self.shape.head_size
        parts = unit.split([group, self.shape.head_size, self.shape.head_size], 1)
        query, key, value = (part.flatten(0, 1) for part in parts)
        return query, key, value

    def _matrix(self, layer: int, part: str, rows: int, columns: int = 0) -> Tensor:
        name = find_tensor(self.files, self.tower.layer.format(layer=layer) + part)
        values = self.files.read(name)
        if self.tower.transposed:
            values = values.mT
        expected = (rows, columns or self.shape.hidden_size)
        if tuple(values.shape) != expected:
            raise ModelError(
                f"{self.files.folder}: {name} is {tuple(values.shape)}, the heads and widths of "
                f"config.json want {expected}; describe the family with --family"
            )
        return values.clone()  # not a view of a mapped file


def find_tensor(files: TensorFiles, name: str) -> str:
    """The one tensor whose name is ``name``, or ends with it after a dot.

    Raises:
        ModelError: showing the tensors found, and how to describe another family.
    """
    found = [one for one in files.names if one == name or one.endswith("." + name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(
            f"{files.folder}: {name} could be {' or '.join(found[:3])}; say more in `layer` of a "
            "--family file"
        )
    raise ModelError(f"{files.folder}: has no {name}; {_how_to_describe(files)}")


def _how_to_describe(files: TensorFiles) -> str:
    attention = [one for one in files.names if "att" in one.lower()] or files.names
    shown = ", ".join(attention[:6])
    return (
        f"its tensors are such as {shown}; describe the family in a YAML file for --family, line "
        f"by line such as: {EXAMPLE}"
    )


def is_pretrained(folder: Path) -> bool:
    """Whether a folder holds a model in Hugging Face's form."""
    return (folder / "config.json").is_file()


def open_pretrained(
    folder: Path, family: Family | None = None, say: Callable[[str], None] = print
) -> list[AttentionTower]:
    """The attention towers of a model on disk; reads no weights yet.

    Args:
        family: where its attention lies; default: by ``model_type``.
        say: told once of what is done worse than usual.

    Raises:
        ModelError: one line naming the file, and for an unknown family how to describe it.
    """
    config = _read_json(folder / "config.json")
    files = TensorFiles(folder, say)
    if family is None:
        kind = str(config.get("model_type", "(none)"))
        family = known_families().get(kind)
        if family is None:
            raise ModelError(
                f"{folder}: model_type {kind} is of no family known here; {_how_to_describe(files)}"
            )
    towers = []
    for name, tower in family.towers.items():
        gain = "." + tower.layer.format(layer=0) + tower.qk_norm
        normed = bool(tower.qk_norm) and any(f".{one}".endswith(gain) for one in files.names)
        towers.append(AttentionTower(name, tower.shape(config, normed), files, tower))
    return towers


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ModelError(f"{path}: damaged (not JSON)") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: damaged (not a mapping)")
    return found
