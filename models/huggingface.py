"""Attention matrices of pretrained models, read from their files tensor by tensor.

No model is built and no code of the model's authors runs. ``config.json`` gives the heads,
`models.families` says where the matrices are, and safetensors (or ``pytorch_model.bin``, weights
only) provides one tensor at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from models.factors import AttentionShape, Factors
from models.families import EXAMPLE, Family, Tower, known_families
from models.quantised import refuse_quantised
from models.roles import ModelError
from models.tensor_files import TensorFiles, read_json

_QK_NORM = re.compile(
    r"(^|\.)((q|k|qk|query|key)_?(norm|ln|layer_?norm|rms_?norm)|(norm|ln|layer_?norm)_?(q|k|qk))"
    r"(\.|$)",
    re.IGNORECASE,
)
_BUFFERS = re.compile(r"(^|\.)(masked_bias|rotary_emb\.inv_freq)$|^bias$")
"""Causal masks and frequencies that old versions of transformers saved."""
_ATTENTION = re.compile(r"(^|\.|_)[a-z]*att(e?n|ention)s?(\.|_|$)", re.IGNORECASE)


class Tensors(Protocol):
    """The tensors of a model by name, in files or in memory."""

    @property
    def folder(self) -> object:
        """What holds them, for messages."""

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without its values."""

    def read(self, name: str) -> Tensor:
        """One tensor."""

    def close(self) -> None:
        """Release what the last tensor needed."""


@dataclass(frozen=True)
class AttentionTower:
    """One stack of attention layers of a pretrained model."""

    name: str
    """Empty for a single tower, otherwise its name (``text``, ``vision``)."""
    shape: AttentionShape
    files: Tensors
    tower: Tower
    rotates: tuple[bool, ...] = ()
    """For each layer, whether it rotates; empty: every layer does, if any."""
    finite: bool = True
    """Refuse weights that are not finite; otherwise their statistics are NaN."""

    def layers(self) -> Iterator[Factors]:
        """The factors of every layer, in order; at most one layer's weights are in memory."""
        for layer in range(self.shape.num_layers):
            yield self.layer(layer)

    def shape_of(self, layer: int) -> AttentionShape:
        """The shape of one layer; some layers of a model may have no rotary positions."""
        if self.rotates and not self.rotates[layer]:
            return replace(self.shape, rotary_dim=0)
        return self.shape

    def layer(self, layer: int) -> Factors:
        """The factors of one layer, in the file's dtype.

        Raises:
            ModelError: naming a tensor that is missing, has an unexpected shape, or has NaNs.
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
                f"{self.files.folder}: {name} is {tuple(values.shape)}, but the heads and widths "
                "of "
                f"config.json need {expected}; describe the family with --family"
            )
        if self.finite and not torch.isfinite(values).all():
            raise ModelError(f"{self.files.folder}: {name} contains NaN or infinity")
        return values.clone()  # not a view of a mapped file


def find_tensor(files: Tensors, name: str) -> str:
    """The one tensor whose name is ``name``, or ends with it after a dot.

    Raises:
        ModelError: showing the tensors found, and how to describe another family.
    """
    matches = [
        candidate
        for candidate in files.names
        if candidate == name or candidate.endswith("." + name)
    ]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise _ambiguous(files, name, matches)
    raise ModelError(f"{files.folder}: has no {name}; {_how_to_describe(files)}")


def _ambiguous(files: Tensors, name: str, matches: list[str]) -> ModelError:
    return ModelError(
        f"{files.folder}: {name} could be {' or '.join(matches[:3])}; make `layer` of a --family "
        "file more specific"
    )


def _how_to_describe(files: Tensors) -> str:
    attention = [name for name in files.names if "att" in name.lower()] or files.names
    shown = ", ".join(attention[:6]) or "(none)"
    return (
        f"its tensors have names like {shown}; describe the family in a YAML file for --family, "
        f"with lines such as: {EXAMPLE}"
    )


def is_pretrained(folder: Path) -> bool:
    """Whether a folder holds a model in Hugging Face's format."""
    return (folder / "config.json").is_file()


def open_pretrained(
    folder: Path,
    family: Family | None = None,
    say: Callable[[str], None] = print,
    allow_unused: bool = False,
) -> list[AttentionTower]:
    """The attention towers of a model on disk; reads no weights yet.

    Args:
        family: where its attention is; default: the family of its ``model_type``.
        say: called with a message for each thing that is done in a worse way than usual.
        allow_unused: continue if the model has attention that belongs to no tower.

    Raises:
        ModelError: one line naming the file, and for an unknown family how to describe it.
    """
    config = read_json(folder / "config.json")
    files = TensorFiles(folder, say)
    refuse_quantised(folder, config, files)
    return attention_towers(config, files, family, say, allow_unused)


def attention_towers(
    config: dict[str, Any],
    files: Tensors,
    family: Family | None,
    say: Callable[[str], None],
    allow_unused: bool = False,
) -> list[AttentionTower]:
    """The attention towers of a model whose tensors are in files or in memory.

    Args:
        config: the content of its config.json.
        files, family, say, allow_unused: as in `open_pretrained`.

    Raises:
        ModelError: as `open_pretrained`.
    """
    folder = files.folder
    if family is None:
        kind = str(config.get("model_type", "(none)"))
        family = known_families().get(kind)
        if family is None:
            raise ModelError(
                f"{folder}: model_type {kind} belongs to no known family; {_how_to_describe(files)}"
            )
    clipped = bool(config.get("clip_qkv"))
    if clipped:
        say(
            f"{folder}: clip_qkv limits queries, keys and values, so the balance law does not "
            "apply to them"
        )
    parts = {name: parts_of(files, tower) for name, tower in family.towers.items()}
    used = {
        tensor for tower in parts.values() for layer in tower.values() for tensor in layer.values()
    }
    normed = clipped or any(_QK_NORM.search(tensor) for tensor in files.names if tensor not in used)
    towers = []
    for name, tower in family.towers.items():
        shape = tower.shape(config, normed or _has_qk_norm(parts[name], tower))
        _check_layers(files, parts[name], tower, shape)
        _check_parts(folder, parts[name], tower)
        rotates: tuple[bool, ...] = ()
        if tower.rotary_layers:
            rotates = tuple(tower.rotates(config, layer) for layer in range(shape.num_layers))
        towers.append(AttentionTower(name, shape, files, tower, rotates))
    if not allow_unused:
        _check_elsewhere(files, family, used)
    return towers


Parts = dict[int, dict[str, str]]
"""Names of a tower's attention tensors, by layer and by the name's part within the layer."""


def parts_of(files: Tensors, tower: Tower) -> Parts:
    head = re.escape(tower.layer).replace(re.escape("{layer}"), r"(\d+)")
    pattern = re.compile(rf"(?:^|.*\.){head}(.+)")
    layers: Parts = {}
    for name in files.names:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        layer = layers.setdefault(int(match[1]), {})
        if match[2] in layer:
            raise _ambiguous(files, match[2], [layer[match[2]], name])
        layer[match[2]] = name
    return layers


def _has_qk_norm(parts: Parts, tower: Tower) -> bool:
    return any(
        _QK_NORM.search(part) or (tower.qk_norm and part == tower.qk_norm)
        for layer in parts.values()
        for part in layer
    )


def _check_layers(files: Tensors, parts: Parts, tower: Tower, shape: AttentionShape) -> None:
    """Refuse files whose layers are not those of config.json."""
    missing = next((layer for layer in range(shape.num_layers) if layer not in parts), None)
    if missing is not None:
        find_tensor(files, tower.layer.format(layer=missing) + (tower.qkv or tower.query))
    beyond = [layer for layer in parts if layer >= shape.num_layers]
    if beyond:
        name = next(iter(parts[min(beyond)].values()))
        raise ModelError(
            f"{files.folder}: contains {name}, but config.json says that there are "
            f"{shape.num_layers} layers; correct the number there"
        )


def _check_parts(folder: object, parts: Parts, tower: Tower) -> None:
    """Refuse a tensor of a layer's attention that is not read and may change a product."""
    read = {
        tensor
        for tensor in (tower.query, tower.key, tower.value, tower.qkv, tower.output)
        if tensor
    }
    biases = {
        tensor.removesuffix("weight") + "bias" for tensor in read if tensor.endswith("weight")
    }
    expected = read | biases | {tower.qk_norm, *tower.beside}
    for layer in parts.values():
        for part, name in layer.items():
            if part not in expected and not _QK_NORM.search(part) and not _BUFFERS.search(part):
                raise ModelError(
                    f"{folder}: {name} is part of the attention but is not read, so the products "
                    "may differ from what the model computes; if it changes none, list "
                    f"{part} under `beside` of a --family file"
                )


def _check_elsewhere(files: Tensors, family: Family, used: set[str]) -> None:
    """Refuse to leave out an attention matrix silently."""
    for name in files.names:
        if name in used or any(f".{fragment}" in f".{name}" for fragment in family.elsewhere):
            continue
        module = name.rpartition(".")[0]
        if _ATTENTION.search(module) and len(files.shape(name)) > 1:
            raise ModelError(
                f"{files.folder}: {name} belongs to an attention that is not measured; "
                "--allow-unused "
                "leaves it out, a --family file can describe it"
            )
