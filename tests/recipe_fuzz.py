"""Random recipes and sweep files: any value at any key, from the schema that the product has."""

from __future__ import annotations

import itertools
import random
import types
import typing
from copy import deepcopy
from enum import Enum
from typing import Any, Literal

from pydantic import BaseModel

from pretrain.config.recipe import Config

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**6, 10**12, 10**19, 2**31, 2**63, 10**400,
    -(10**30),
    0.0, 0.5, -0.5, 1.0, 1.5, 1e-300, 1e300, 1e30, float("inf"), float("-inf"), float("nan"),
    "", " ", "0", "1", "auto", "none", "all", "3e-4", "1e999", "nan", "inf", "-inf", "1_000",
    "0x10", "010", "1:30", "yes", "on", "~", "null", "é🙂", "a\nb", "\t", "\x1b[31m", "\u202e",
    "<script>",
    "[red]x[/red]", "../../x", "/etc/passwd", "/dev/zero", ".", "..", "a" * 5000, "${HOME}", "${",
    "%s",
    "s3://user:password@host/x", "file:///etc", "qk", "attention", "0-3,7", "3-0", "0-999999999999",
    "1-", "-1", [], {}, [[]], [{}], [None], [1, "a"], ["attention"], ["nonsense"], {"a": 1},
    {"a": {"b": {}}}, {"": 0}, {"attention": 1}, {"a.b": [1]}, {1: 2}, {None: None}, {True: 1},
    {1.5: 1},
    [{"kind": "schedule"}], [{"kind": None}], [{"kind": "awd", "roles": []}], b"\xff", 2 + 0.25,
    [0] * 1000,
)  # fmt: skip
"""What nobody meant, of every type that YAML has."""

GOOD: dict[type, tuple[Any, ...]] = {
    int: (0, 1, 2, 3, 4, 8, 16, 33, 100, 1000, 10**5),
    float: (0, 1e-8, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0, 2.0, 10, 1e3),
    bool: (True, False),
    str: ("", "train", "val", "x", "0", "0-1"),
}
"""Values of a type that may well be meant."""


class Key(typing.NamedTuple):
    """A place of the schema: its path, and values that its type allows."""

    path: tuple[str | int, ...]
    good: tuple[Any, ...]


def keys_of(model: type[BaseModel], before: tuple[str | int, ...] = ()) -> list[Key]:
    """Every key of a section and of the sections in it, lists' first elements included."""
    found = []
    for name, field in model.model_fields.items():
        shown = field.alias or name
        found += _keys_at((*before, shown), field.annotation)
    return found


def _keys_at(path: tuple[str | int, ...], kind: Any) -> list[Key]:
    good: list[Any] = []
    below: list[Key] = []
    for one in _alternatives(kind):
        origin, inner = typing.get_origin(one), typing.get_args(one)
        if isinstance(one, type) and issubclass(one, BaseModel):
            below += keys_of(one, path)
        elif origin is Literal:
            good += inner
        elif origin is list:
            below += _keys_at((*path, 0), inner[0])
        elif origin is dict:
            below += _keys_at((*path, "attention"), inner[1])
        elif isinstance(one, type):
            good += [member.value for member in one] if issubclass(one, Enum) else GOOD.get(one, ())
    return [Key(path, tuple(good)), *below]


def _alternatives(kind: Any) -> list[Any]:
    if typing.get_origin(kind) is typing.Annotated:
        return _alternatives(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [one for part in typing.get_args(kind) for one in _alternatives(part)]
    return [kind]


def put(tree: Any, path: tuple[str | int, ...], value: Any) -> None:
    """Set a value, making the mappings and lists on the way."""
    for part, after in itertools.pairwise(path):
        empty: Any = [{}] if after == 0 else {}
        if isinstance(part, int):
            tree = tree[0]
            continue
        if not isinstance(tree.get(part), list if after == 0 else dict):
            tree[part] = empty
        tree = tree[part]
    if isinstance(path[-1], int):
        tree[:] = [value]
    else:
        tree[path[-1]] = value


def misspelt(rng: random.Random, name: str) -> str:
    """A name with a letter changed, or another one altogether."""
    place = rng.randrange(len(name))
    near = (name[:place] + name[place + 1 :] or "q", name + "s", name.upper(), "-" + name)
    return rng.choice((*near, "é", "a.b", "", "[x]", "\x1b[2J", "__class__"))


def spoil(
    rng: random.Random, base: dict[str, Any], keys: list[Key]
) -> tuple[dict[str, Any], list[str]]:
    """A recipe with up to three values or keys changed, and the names of these keys."""
    tree = deepcopy(base)
    changed = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key = rng.choice(keys)
        value = rng.choice(key.good) if key.good and rng.random() < 0.4 else rng.choice(ODD)
        path = key.path
        if rng.random() < 0.08:
            path = (*path[:-1], misspelt(rng, str(path[-1])))
        try:
            put(tree, path, deepcopy(value))
        except (AttributeError, TypeError, IndexError, KeyError):
            continue  # an earlier change took away the section that this one lies in
        changed.append(".".join(str(part) for part in path))
    return tree, changed


CONFIG_KEYS = keys_of(Config)
