"""Chooses the steps that a report shows of a long run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

MOST_STEPS = 500
"""Largest number of measurements of a run that a report shows."""
_T = TypeVar("_T")


def shown_steps(steps: list[int]) -> list[int]:
    """At most `MOST_STEPS` of the measured steps, in order, with the first and the last.

    They lie on a grid, of the interval between measurements times a power of two. So runs that were
    measured at the same steps show the same ones, and a run that lacks a step lacks only that one.
    """
    chosen, first = steps, steps[0] if steps else 0
    stride = math.gcd(*(step - first for step in steps[:-1])) or 1
    while len(chosen) > MOST_STEPS:
        stride *= 2
        inner = [step for step in chosen[1:-1] if (step - first) % stride == 0]
        chosen = [first, *inner, steps[-1]]
    has_grid = 4 * len(chosen) >= min(len(steps), MOST_STEPS)
    return chosen if has_grid else some_of(steps, MOST_STEPS)


def some_of(values: Sequence[_T], most: int) -> list[_T]:
    """At most ``most`` items, evenly spaced, including the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
