"""The page docs/recipe.md: ``python -m pretrain.config.reference`` prints it."""

from __future__ import annotations

import math
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from models.config import PRESETS, GPTConfig
from pretrain.config.kinds import KindSection
from pretrain.config.recipe import Config
from pretrain.decay.registry import POLICIES
from pretrain.runs.service import SERVICES

INTRODUCTION = """# Every key of a recipe

A recipe is a YAML file of sections, such as the [ones that come with the
program](training.md#recipes-that-come-with-it). Every key has a
default, so a recipe names only what differs. `SECTION.KEY=VALUE` on the command line replaces a
value: `pretrain train configs/gpt-tiny.yaml train.steps=200`. An unknown key or an impossible value
ends the command with one line that names it. `pretrain train RECIPE --dry-run` shows what a recipe
means.

This page is made from the classes that validate a recipe: `python -m pretrain.config.reference`
prints it.
"""
_BY_DIALECT = "by dialect"
_LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_BEYOND = 10_000
"""Limits from here on are beyond any model, and are not shown."""
_WORDS = {int: "integer", float: "number", bool: "`true`, `false`", str: "text", type(None): "null"}


@dataclass(frozen=True)
class RecipeKey:
    """A key: its name, the values that it takes, its default, and its meaning."""

    name: str
    values: str
    default: str
    meaning: str


@dataclass(frozen=True)
class KeyTable:
    """The keys of a section."""

    title: str
    about: str
    keys: tuple[RecipeKey, ...]


def tables() -> Iterator[KeyTable]:
    """Yield every section of a recipe, then the built-in entries of its open lists."""
    yield from _tables("", Config)
    lists: dict[str, Mapping[str, type[BaseModel]]] = {
        "optimizer.weight_decay.policies": POLICIES.built_in_sections(),
        "logging.trackers": SERVICES.built_in_sections(),
    }
    for place, entries in lists.items():
        for kind, section in entries.items():
            yield from _tables(f"{place}: kind: {kind}", section)


def markdown() -> str:
    """The text of docs/recipe.md."""
    parts = [INTRODUCTION]
    for table in tables():
        parts.append(f"## {table.title}\n\n{table.about}\n")
        rows = [(f"`{key.name}`", key.values, key.default, key.meaning) for key in table.keys]
        parts.append(as_table(("key", "values", "default", "meaning"), rows))
        if table.title == "model":
            parts.append("The dialects set these defaults:\n")
            parts.append(as_table(("key", *PRESETS), _presets()))
    return "\n".join(parts)


def as_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _presets() -> list[tuple[str, ...]]:
    keys = dict.fromkeys(key for preset in PRESETS.values() for key in preset)
    fields = GPTConfig.model_fields
    return [
        (f"`{key}`", *(_shown(preset.get(key, fields[key].default)) for preset in PRESETS.values()))
        for key in keys
    ]


def _tables(title: str, section: type[BaseModel]) -> Iterator[KeyTable]:
    """Yield a section's own keys, then the tables of the sections within it."""
    inner = {
        name: field.annotation
        for name, field in section.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    keys = tuple(
        _key(section, name, field)
        for name, field in section.model_fields.items()
        if name not in inner and not (name == "kind" and issubclass(section, KindSection))
    )
    about = " ".join((section.__doc__ or "").split("\n\n")[0].split())
    if keys:
        yield KeyTable(title or "The top level", about, keys)
    for name, field in section.model_fields.items():
        if name in inner:
            yield from _tables(f"{title}.{name}".lstrip("."), inner[name])
        elif element := _element(field):
            yield from _tables(f"{title}.{name}: an entry".lstrip("."), element)


def _element(field: FieldInfo) -> type[BaseModel] | None:
    """The section of a list's entries, if they are sections of one class."""
    arguments = get_args(field.annotation)
    if get_origin(field.annotation) is list and isinstance(arguments[0], type):
        return arguments[0] if issubclass(arguments[0], BaseModel) else None
    return None


def _key(section: type[BaseModel], name: str, field: FieldInfo) -> RecipeKey:
    words, null = _values(field.annotation), ", or null"
    optional = null if words.endswith(null) else ""
    values = words.removesuffix(optional) + _limits(field.metadata) + optional
    if section is GPTConfig and any(name in preset for preset in PRESETS.values()):
        default = _BY_DIALECT
    elif field.is_required():
        default = "none: must be set"
    else:
        default = _shown(field.get_default(call_default_factory=True))
    return RecipeKey(name, values, default, escaped(field.description or ""))


def _limits(rules: Iterable[Any]) -> str:
    limits = [
        f"{sign} {_number(getattr(rule, name))}"
        for rule in rules
        for name, sign in _LIMITS.items()
        if abs(getattr(rule, name, math.inf)) < _BEYOND
    ]
    return f" {', '.join(limits)}" if limits else ""


def _values(annotation: Any) -> str:
    """The values of a type, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if {int, float} <= set(arguments):
            return ", or ".join(["number", *map(_values, arguments[2:])])
        return ", or ".join(map(_values, arguments))
    if origin is Annotated:
        rules = [rule for one in arguments[1:] for rule in getattr(one, "metadata", [])]
        return _values(arguments[0]) + _limits(rules)
    if origin is Literal:
        return _quoted(arguments)
    if origin is dict:
        return f"a mapping of names to {_values(arguments[1])}"
    if origin is list:
        return f"a list of {_values(arguments[0])}"
    return _values_of_class(annotation)


def _values_of_class(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _quoted(member.value for member in annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mappings"
    return _WORDS.get(annotation, "any value")


def _quoted(values: Iterable[Any]) -> str:
    return ", ".join(_shown(value) for value in values)


def _shown(value: Any) -> str:
    """A default as a recipe writes it."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, Enum):
        return f"`{value.value}`"
    if isinstance(value, int | float):
        return f"`{_number(value)}`"
    if value is None or value == "":
        return "empty"
    return f"`{value}`"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def escaped(text: str) -> str:
    """Text for a cell of a table, on one line; pages of docs/ become links."""
    text = re.sub(r"docs/(\w+)\.md", r"[\1](\1.md)", text)
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    sys.stdout.write(markdown())
