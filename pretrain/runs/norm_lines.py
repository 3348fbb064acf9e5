"""Reads lines of norms from ``metrics.jsonl``, one figure for each role."""

from __future__ import annotations

import math
from typing import Any

NORMS = ("weights", "gradients", "updates")
"""Kinds of norms in a line, by role and layer."""
LARGEST_LOGIT = "largest_logit"
"""The figure of a line about attention logits, by layer."""


def norms_by_role(row: dict[str, Any]) -> dict[str, float]:
    """The norms of one line over all layers: ``{"weights/query": 3.2, "largest_logit": 5.1}``.

    The norm of a role is that of all its parameters, the root of the sum of the layers' squares.
    A value that was not finite is NaN.

    Raises:
        ValueError: naming the figure that is not as training writes it.
    """
    figures: dict[str, float] = {}
    for kind in NORMS:
        for role, by_layer in _mapping(row.get(kind, {}), kind).items():
            name = f"{kind}/{role}"
            values = [_number(value, name) for value in _mapping(by_layer, name).values()]
            figures[name] = math.hypot(*values)
    logits = _mapping(row.get(LARGEST_LOGIT, {}), LARGEST_LOGIT)
    if logits:
        values = [_number(value, LARGEST_LOGIT) for value in logits.values()]
        figures[LARGEST_LOGIT] = math.nan if any(map(math.isnan, values)) else max(values)
    return figures


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: must be a group of figures")
    return value


def _number(value: Any, name: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: must be a number or null")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: must be a number or null") from None
