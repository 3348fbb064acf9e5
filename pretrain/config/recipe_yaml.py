"""Strict YAML: every key only once, and only unambiguous numbers.

PyYAML reads YAML 1.1: ``010`` is 8, ``1:30`` is 90, ``on`` is true, and if a key is given twice,
the last one wins silently.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class RecipeError(Exception):
    """A description of what is wrong with a text; ``line`` counts from 1, 0 if unknown."""

    def __init__(self, problem: str, line: int = 0) -> None:
        super().__init__(problem)
        self.line = line


class _Loader(yaml.SafeLoader):
    """A loader with only the unambiguous numbers and booleans of YAML 1.1, and no key twice.

    Text that PyYAML writes without quotes stays text, so that a recipe can be read back unchanged.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        first: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, str | int | float | bool) or key is None:
                if key in first:
                    raise RecipeError(
                        f"{key}: is given on line {first[key]} and again on line {line}; keep one",
                        line,
                    )
                first[key] = line
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_INTEGER = r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+"
_FLOAT = (
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_RESOLVERS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("float", _FLOAT, "-+0123456789."),
    ("int", _INTEGER, "-+0123456789"),
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
)
_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}",
        re.compile(f"^(?:{_pattern})$"),
        ["" if letter == "\0" else letter for letter in _first],
    )
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(str(node.value).replace("_", ""), 0),
)


_TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("str", "int", "float", "bool", "null", "map", "seq", "merge")
}
_MOST_VALUES = 100_000
"""Check the size with every alias expanded: a hundred bytes may stand for 10^9 values."""


def load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        RecipeError: if it is not YAML, gives a key twice, is nested too deeply, or expands to more
            values than a recipe has.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _count(node, {}) > _MOST_VALUES:
                raise RecipeError(f"expands to more than {_MOST_VALUES:,} values")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "not YAML"
        raise RecipeError(f"not valid YAML ({problem})", mark.line + 1 if mark else 0) from None
    except RecursionError:
        raise RecipeError("nested too deeply") from None
    except ValueError as error:  # an impossible date, or an integer with thousands of digits
        raise RecipeError(f"not valid YAML ({error})") from None


def _count(node: Any, counts: dict[int, int]) -> int:
    """Number of values in a node with aliases expanded; each node is visited once.

    Args:
        counts: the numbers counted so far, by the node's identity.

    Raises:
        RecipeError: if the node is part of itself.
    """
    if node.tag not in _TAGS:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        raise RecipeError(f"{kind}: this kind of value is not allowed", node.start_mark.line + 1)
    if id(node) not in counts:
        counts[id(node)] = 0  # being counted
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [
            part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,))
        ]
        counts[id(node)] = 1 + sum(_count(part, counts) for part in children)
    if not counts[id(node)]:
        raise RecipeError("has an alias that contains itself", node.start_mark.line + 1)
    return counts[id(node)]
