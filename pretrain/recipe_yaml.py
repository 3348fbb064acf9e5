"""YAML as people mean it: every key once, and numbers that look like what they are.

PyYAML reads YAML 1.1: ``010`` is 8, ``1:30`` is 90, ``on`` is true, and of a key that is given
twice the last wins in silence.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class RecipeError(Exception):
    """What is wrong with a text, in words; ``line`` counts from 1, 0 if unknown."""

    def __init__(self, problem: str, line: int = 0) -> None:
        super().__init__(problem)
        self.line = line


class _Loader(yaml.SafeLoader):
    """Of YAML 1.1's numbers and truth values those that are nothing else, and no key twice.

    What PyYAML writes plainly as text stays text, so that a recipe is read back as it was.
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
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


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
        ["" if one == "\0" else one for one in _first],
    )
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(str(node.value).replace("_", ""), 0),
)


def load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        RecipeError: if it is not YAML, gives a key twice, or is nested too deeply.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "not YAML"
        raise RecipeError(f"not valid YAML ({problem})", mark.line + 1 if mark else 0) from None
    except RecursionError:
        raise RecipeError("nested too deeply") from None
    except ValueError as error:  # a date that is none, an integer of thousands of digits
        raise RecipeError(f"not valid YAML ({error})") from None
