"""Sums of figures that a file has, which may be any numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable


def total(values: Iterable[float]) -> float:
    """The sum of figures, correctly rounded; infinite or NaN where it has no finite value."""
    figures = list(values)
    try:
        return math.fsum(figures)
    except (OverflowError, ValueError):  # above the largest number on the way, or inf - inf
        special = [value for value in figures if not math.isfinite(value)]
        if special:
            return sum(special)
        return math.fsum(value * 0.5**60 for value in figures) * 2.0**60


def mean(values: Iterable[float]) -> float:
    """The mean of figures; 0 of none."""
    figures = list(values)
    return total(figures) / max(1, len(figures))
