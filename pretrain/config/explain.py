"""Explains errors of a recipe, a sweep or a site file in one line."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails, PydanticCustomError

from pretrain.config.urls import without_secrets

_ALTERNATIVE = re.compile(r"(list|dict|literal)\[")
"""Names that pydantic inserts between keys for one of several types of a value."""
_KEY = re.compile(r"[\w.\[\]-]+")
_EXPLAINED = "explained"
"""Type of an error whose text is shown as it is."""


def explain(error: ErrorDetails, root: type[BaseModel]) -> str:
    """One line about a validation error: the key, what is wrong, and the nearest known key."""
    parts = [part for part in error["loc"] if not _ALTERNATIVE.match(str(part))]
    path = [str(part) for part in parts]
    key = _joined(parts) or "recipe"
    if error["type"] == "extra_forbidden":
        keys = _keys_beside(path, root)
        close = difflib.get_close_matches(path[-1], keys, 1)
        key = cut(key)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(keys)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "value_error":
        text = str(error.get("ctx", {}).get("error", error["msg"]))
        head, colon, _ = text.partition(":")
        if path and not (colon and _KEY.fullmatch(head)):
            return f"{key}: {text}"
        return text if not path or head.endswith(path[-1]) or "." in head else f"{key}.{text}"
    if error["type"] == "missing":
        example = ", such as [attention]" if path[-1:] == ["roles"] else ""
        return f"{key}: is required{example}; it is missing"
    if error["type"] == _EXPLAINED:
        return f"{key}.{error['msg']}"
    value = without_secrets(repr(error.get("input")))
    return f"{key}: {cut(error['msg'].lower())}, got {cut(value)}"


def _joined(parts: list[int | str]) -> str:
    """A key as messages write it: ``policies[0].kind``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".")


def explained(text: str) -> PydanticCustomError:
    """A validator's error that `explain` shows as it is, after the key."""
    return PydanticCustomError(_EXPLAINED, "{text}", {"text": text})


def cut(text: str, length: int = 200) -> str:
    """The beginning of a text, for a message."""
    return text if len(text) <= length else f"{text[:length]}..."


def _keys_beside(path: list[str], root: type[BaseModel]) -> list[str]:
    model: Any = root
    for part in path[:-1]:
        if part.isdigit() and get_args(model):  # an item of a list
            model = get_args(model)[0]
            continue
        if not _is_section(model):
            return []
        field = model.model_fields.get(part)
        model = field.annotation if field else None
    return sorted(model.model_fields) if _is_section(model) else []


def _is_section(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, BaseModel)
