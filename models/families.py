"""Describes where a family of pretrained models stores its attention, as data and not as code.

``families.yaml`` in this folder describes the known families; a user's file describes another one
with the same keys.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.factors import AttentionShape
from models.roles import ModelError

Keys = str | int | list[str | int]
"""A key of config.json, a number, or a list of alternatives, of which the first present is used."""

EXAMPLE = (
    "model_types: [mine] / layer: 'blocks.{layer}.attn.' / query: q.weight / key: k.weight / "
    "value: v.weight / output: o.weight / layers: n_layers / heads: n_heads / width: d_model / "
    "rotary: 1.0"
)
"""Ten lines that describe a family, for error messages."""


class Tower(BaseModel):
    """The attention of one stack of layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: str | list[str] = Field("", description="section of config.json; empty: the whole")
    layer: str = Field(description="common prefix of a layer's tensor names, with {layer}")
    query: str = ""
    key: str = ""
    value: str = ""
    qkv: str = Field("", description="one tensor instead of query, key and value")
    order: Literal["stacked", "per_head"] = Field(
        "stacked", description="rows of qkv: all of q, all of k, all of v; or head by head"
    )
    output: str
    transposed: bool = Field(False, description="matrices are stored [in, out]")
    layers: Keys
    heads: Keys
    key_value_heads: Keys = ""
    head_dim: Keys = ""
    width: Keys
    rotary: float | str | list[float | str] = Field(
        0.0,
        description="share of a head that rotates, as pairs (j, j + half); or keys of config.json",
    )
    rotary_layers: str = Field(
        "", description="key of a list with 1 for each layer that rotates, else 0"
    )
    qk_norm: str = Field("", description="a tensor that exists if queries are normalised")
    beside: list[str] = Field(
        [], description="other tensors of the layer that change no product, such as 'sinks'"
    )
    live: dict[str, str] = Field(
        {}, description="keys above that differ in the class itself, whose files have other names"
    )

    @property
    def in_memory(self) -> Tower:
        """The tower with the names that the class itself has."""
        return self.model_copy(update={**self.live, "live": {}})

    @model_validator(mode="after")
    def _whole(self) -> Tower:
        if bool(self.qkv) == bool(self.query and self.key and self.value):
            raise ValueError("give query, key and value, or qkv and order")
        if "{layer}" not in self.layer:
            raise ValueError("layer: must contain {layer}")
        return self

    def shape(self, config: dict[str, Any], qk_norm: bool) -> AttentionShape:
        """Heads and widths from ``config.json``.

        Raises:
            ModelError: naming the key that is missing.
        """
        section = self._section(config)
        heads, width = self._count(section, self.heads), self._count(section, self.width)
        head = self._count(section, self.head_dim, width // heads)
        shape = AttentionShape(
            num_layers=self._count(section, self.layers),
            num_attention_heads=heads,
            key_value_heads=self._count(section, self.key_value_heads, heads),
            head_size=head,
            hidden_size=width,
            rotary_dim=int(head * self._rotary(section)) // 2 * 2,
            qk_norm=qk_norm or _says_qk_norm(section),
        )
        if heads % shape.key_value_heads:
            raise ModelError(
                f"config.json: {shape.key_value_heads} key/value heads cannot be shared by {heads} "
                "query heads"
            )
        return shape

    def rotates(self, config: dict[str, Any], layer: int) -> bool:
        """Whether positions rotate in a layer.

        Raises:
            ModelError: if config.json does not define this for every layer.
        """
        if not self.rotary_layers:
            return True
        flags = _lookup(self._section(config), self.rotary_layers)
        if not isinstance(flags, list) or layer >= len(flags) or flags[layer] not in (0, 1):
            raise ModelError(
                f"config.json: {self.rotary_layers} has no 0 or 1 for layer {layer}; add it"
            )
        return bool(flags[layer])

    def _section(self, config: dict[str, Any]) -> dict[str, Any]:
        names = [self.config] if isinstance(self.config, str) else self.config
        for name in names:
            section = _lookup(config, name) if name else config
            if isinstance(section, dict):
                return section
        raise ModelError(f"config.json: has no section {' or '.join(names)}; add it")

    def _count(self, section: dict[str, Any], keys: Keys, default: int | None = None) -> int:
        names = keys if isinstance(keys, list) else [keys]
        counts: dict[str | int, int] = {}
        for name in names:
            value = _lookup(section, name) if isinstance(name, str) and name else name or None
            if value is None or (counts and isinstance(name, int)):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"config.json: {name} is {value!r}, not a number above 0")
            counts[name] = value
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name}={value}" for name, value in counts.items())
            raise ModelError(f"config.json: {listed} contradict each other; keep the correct one")
        if counts:
            return next(iter(counts.values()))
        if default is None:
            raise ModelError(
                f"config.json: has no {' or '.join(map(str, names))}; add it (a file without it "
                "relies "
                "on the default of its class in transformers)"
            )
        return default

    def _rotary(self, section: dict[str, Any]) -> float:
        for choice in self.rotary if isinstance(self.rotary, list) else [self.rotary]:
            value = _lookup(section, choice) if isinstance(choice, str) else choice
            if isinstance(value, int | float):
                return float(value)
        return 0.0


class Family(BaseModel):
    """One or several towers, and the values of ``model_type`` that belong to them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_types: list[str] = []
    roles: dict[str, str | list[str]] = Field(
        {}, description="tensor names, with {layer}, of the matrices outside attention, by role"
    )
    towers: dict[str, Tower]
    """The towers by name; a single tower has an empty name."""
    elsewhere: list[str] = Field(
        [],
        description="name prefixes of attention that is in no tower, such as 'vision_model.head.'",
    )


_QK_NORM_KEY = re.compile(r"(use_)?(qk|query_key)_?(l2_?)?(norm|layer_?norm)")


def _says_qk_norm(section: dict[str, Any]) -> bool:
    """Whether config.json asks for normalised queries, which may need no tensor (Llama 4's)."""
    return any(bool(value) and _QK_NORM_KEY.fullmatch(key) for key, value in section.items())


def _lookup(section: dict[str, Any], key: str) -> Any:
    value: Any = section
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


@cache
def known_families() -> dict[str, Family]:
    """The families that ``families.yaml`` describes, by ``model_type``."""
    path = Path(__file__).with_name("families.yaml")
    described = yaml.safe_load(path.read_text(encoding="utf-8"))
    families: dict[str, Family] = {}
    for name, values in described.items():
        family = family_of(values, f"{path.name}: {name}")
        families |= dict.fromkeys(family.model_types, family)
    return families


def family_of(values: dict[str, Any], source: str) -> Family:
    """A family as a YAML file describes it.

    Raises:
        ModelError: one line naming the source and the key.
    """
    if "towers" not in values:
        common: dict[str, Any] = {
            key: values[key] for key in ("model_types", "elsewhere", "roles") if key in values
        }
        tower = {key: value for key, value in values.items() if key not in common}
        values = {**common, "towers": {"": tower}}
    try:
        return Family.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part not in ("towers", ""))
        raise ModelError(f"{source}: {key}: {first['msg'].lower()}") from None
