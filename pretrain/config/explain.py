"""What is wrong with a recipe, a sweep or a site file, in one line."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from pretrain.config.decay import (
    AdaptiveDecay,
    AlphaDecay,
    DecayRule,
    RankTarget,
    ScheduleDecay,
    Section,
)
from pretrain.config.run import without_secrets

_ALTERNATIVE = re.compile(r"(list|dict|literal)\[")
"""How pydantic names one of several types that a value may have, between the keys."""


def explain(error: ErrorDetails, root: type[BaseModel]) -> str:
    """One line on a validation error: the key, what is wrong, and the nearest known key."""
    path = [str(part) for part in error["loc"] if not _ALTERNATIVE.match(str(part))]
    key = ".".join(path) or "recipe"
    if error["type"] == "extra_forbidden":
        known = _keys_beside(path, root)
        close = difflib.get_close_matches(path[-1], known, 1)
        key = cut(key)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "value_error":
        text = str(error.get("ctx", {}).get("error", error["msg"]))
        head = text.split(":", maxsplit=1)[0]
        return text if not path or head.endswith(path[-1]) or "." in head else f"{key}.{text}"
    if error["type"] == "union_tag_not_found":
        return f"{key}.kind: missing"
    value = without_secrets(repr(error.get("input")))
    return f"{key}: {cut(error['msg'].lower())}, got {cut(value)}"


def cut(text: str, most: int = 200) -> str:
    """The beginning of a text, for a message."""
    return text if len(text) <= most else f"{text[:most]}..."


def _keys_beside(path: list[str], root: type[BaseModel]) -> list[str]:
    model: Any = root
    for part in path[:-1]:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            break
        field = model.model_fields.get(part)
        model = field.annotation if field else None
    if isinstance(model, type) and issubclass(model, BaseModel):
        return sorted(model.model_fields)
    if "policies" in path:  # ..., index, kind, key
        kinds: dict[str, type[Section]] = {
            "schedule": ScheduleDecay, "alpha": AlphaDecay, "awd": AdaptiveDecay
        }  # fmt: skip
        return sorted(kinds.get(path[-2], RankTarget).model_fields)
    return sorted(DecayRule.model_fields) if "rules" in path else []
