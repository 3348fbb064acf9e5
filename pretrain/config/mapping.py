"""Reads a recipe, sweep or site file as a plain mapping, and applies overrides."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from data_pipeline.files import read_small
from pretrain.config.explain import cut
from pretrain.config.recipe_yaml import RecipeError, load_yaml
from pretrain.config.urls import without_secrets
from pretrain.errors import UsageError

LARGEST_RECIPE = 1 << 20
"""Largest size of a YAML file in bytes."""


def read_mapping(path: Path, noun: str, content: str) -> dict[str, Any]:
    """Read a YAML file that is a mapping.

    Args:
        noun, content: for the messages: "a recipe is a mapping of sections".

    Raises:
        UsageError: one line that names the file and what to do.
    """
    try:
        text = read_small(path, LARGEST_RECIPE).decode("utf-8-sig")
        values = load_yaml(text) or {}
    except OSError as error:
        mend = "; save it as a file" if error.errno == errno.ENXIO else ""
        raise UsageError(f"{path}: cannot read the {noun} ({error.strerror}){mend}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except RecipeError as error:
        raise UsageError(f"{path}{f':{error.line}' * bool(error.line)}: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a {noun} is a mapping of {content}")
    return values


def apply_value_overrides(values: dict[str, Any], overrides: list[str]) -> None:
    """Apply ``key.path=value`` overrides to a plain mapping.

    Raises:
        UsageError: naming the override.
    """
    for override in overrides:
        _apply(values, override)


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UsageError(f"{override!r}: write an override as key.path=value")
    try:
        value = load_yaml(text)
    except RecipeError as error:
        shown = cut(without_secrets(repr(override)))
        raise UsageError(f"{shown}: the value is {error}") from None
    set_value(values, key, value, cut(without_secrets(repr(override))))


def set_value(tree: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set the value of a dotted key, and make missing sections."""
    *parents, leaf = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise UsageError(f"{source}: {parent} is a value, not a section")
    tree[leaf] = number(value)


def number(value: Any) -> Any:
    """Convert text such as 3e-4, which YAML 1.1 does not read as a number, to a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def value_in(tree: Any, key: str) -> Any:
    """The value at a dotted key of plain data; None if there is none."""
    if not isinstance(tree, dict):
        return None
    if key in tree:
        return tree[key]
    parts = (part for part in tree if key.startswith(f"{part}."))
    values = (value_in(tree[part], key[len(part) + 1 :]) for part in parts)
    return next((value for value in values if value is not None), None)
