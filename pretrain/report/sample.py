"""Chooses the steps that a report shows of a long run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

MOST_STEPS = 500
"""Largest number of measurements of a run that a report shows."""
_T = TypeVar("_T")


def shown_steps(steps: list[int], most: int = MOST_STEPS) -> list[int]:
    """At most ``most`` of the measured steps, in order, with the first and the last.

    They lie on a grid, of the interval between measurements times a power of two.
    """
    chosen, first = steps, steps[0] if steps else 0
    stride = math.gcd(*(step - first for step in steps[:-1])) or 1
    while len(chosen) > most:
        stride *= 2
        inner = [step for step in chosen[1:-1] if (step - first) % stride == 0]
        chosen = [first, *inner, steps[-1]]
    has_grid = 4 * len(chosen) >= min(len(steps), most)
    return chosen if has_grid else some_of(steps, most)


def steps_of_all(measured: list[list[int]]) -> set[int]:
    """The steps that a report of several runs shows: each run has the same ones, if measured.

    Args:
        measured: the steps of each run, in order.

    Returns:
        `shown_steps` of all of them, and the first and the last of each run.
    """
    everything = sorted({step for steps in measured for step in steps})
    ends = {step for steps in measured if steps for step in (steps[0], steps[-1])}
    return {*shown_steps(everything), *ends}


def some_of(values: Sequence[_T], most: int) -> list[_T]:
    """At most ``most`` items, evenly spaced, including the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
