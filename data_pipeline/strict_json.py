"""Writes JSON that every parser can read: a number that is not finite becomes null.

Python would write ``NaN`` and ``Infinity``, which are not JSON.
"""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON, with null for numbers that are not finite (`not_finite` lists them)."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def not_finite(value: Any, path: str = "") -> list[str]:
    """Dotted paths of the numbers in ``value`` that `to_json` writes as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return [path]
    if isinstance(value, dict):
        parts = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(str(index), part) for index, part in enumerate(value)]
    else:
        return []
    return [
        name for key, part in parts for name in not_finite(part, f"{path}.{key}" if path else key)
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
