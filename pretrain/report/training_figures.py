"""Figures of training: losses, and what the optimizer did."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from pretrain.ranks.columns import AnyRow, column_of
from pretrain.report.figure_parts import (
    about,
    mean_over,
    sampled,
    shade,
)
from pretrain.report.load import Condition, RunData, Study
from pretrain.report.sample import some_of
from pretrain.report.spec import Choice, Figure, Panel, Series

_MOST_POINTS = 1000
"""Largest number of points of a line over the steps, evenly spaced."""
_SMOOTHED = ", running mean"
"""Ends the label of an axis of `_smooth` values."""


def losses(study: Study) -> Figure:
    """Training and held-out loss."""

    def view(choice: Choice) -> list[Panel]:
        count = len(study.conditions)
        training, held_out = [], []
        for index, condition in enumerate(study.conditions):
            colour = shade(index, count)
            x, y = averaged(condition, lambda run: _over_steps(run.metrics, "loss"))
            training.append(line_over(condition.name, x, y, colour, smooth=True))
            x, y = averaged(condition, lambda run: _over_steps(run.held_out, "loss"))
            held_out.append(line_over(condition.name, x, y, colour))
        return [
            Panel("training, running mean", "step", "loss, nats per token", training),
            Panel("held out, fixed sample", "step", "loss, nats per token", held_out),
        ]

    return Figure(
        "loss",
        "Loss",
        f"Training loss (mean over seeds, running mean over a thirtieth of the run) and loss on a "
        f"fixed sample of held-out documents. {about(study)}",
        [],
        view,
    )


Line = tuple[Sequence[int], Sequence[float]]
"""Steps and a value at each."""


def _over_steps(rows: Sequence[AnyRow], name: str) -> Line:
    return column_of(rows, "step"), column_of(rows, name)


def averaged(condition: Condition, line_of: Callable[[RunData], Line]) -> Line:
    """The mean of a condition's runs at every step that one of them has."""
    lines = [line_of(run) for run in condition.runs]
    steps = lines[0][0]
    if len(lines) == 1 and all(a < b for a, b in pairwise(steps)):
        return lines[0]
    if all(line_steps == steps for line_steps, _ in lines) and all(
        a < b for a, b in pairwise(steps)
    ):
        return steps, [
            mean_over(list(values)) for values in zip(*(y for _, y in lines), strict=True)
        ]
    by_step: dict[int, list[float]] = defaultdict(list)
    for x, y in lines:
        for step, value in zip(x, y, strict=True):
            by_step[step].append(value)
    return sorted(by_step), [mean_over(by_step[step]) for step in sorted(by_step)]


def _smooth(values: Sequence[float], indices: list[int]) -> list[float]:
    """Running mean over the last thirtieth of the run; values that are not finite do not count.

    Args:
        indices: positions of the values to return.
    """
    finite = [math.isfinite(value) for value in values]
    sums = [0.0, *accumulate(v if ok else 0.0 for v, ok in zip(values, finite, strict=True))]
    counts = [0, *accumulate(map(int, finite))]
    width = max(1, len(values) // 30) + 1
    ends = [place + 1 for place in indices]
    starts = [max(0, i - width) for i in ends]
    return [
        (sums[i] - sums[start]) / (counts[i] - counts[start])
        if counts[i] > counts[start]
        else math.nan
        for i, start in zip(ends, starts, strict=True)
    ]


def line_over(
    name: str, x: Sequence[int], y: Sequence[float], colour: float, smooth: bool = False
) -> Series:
    """A line with only as many points as a reader can see."""
    indices = some_of(range(len(x)), _MOST_POINTS)
    values = _smooth(y, indices) if smooth else [y[i] for i in indices]
    return Series(name, [float(x[i]) for i in indices], values, colour)


def settings(study: Study) -> Figure:
    """Learning rate, λ, gradient norm and speed."""

    def used(run: RunData) -> Line:
        rows: dict[int, list[AnyRow]] = defaultdict(list)
        for row in run.heads:
            rows[row["step"]].append(row)
        return sorted(rows), [
            mean_over(run.of_factors(rows[step], "decay")) for step in sorted(rows)
        ]

    measures: dict[str, Callable[[RunData], Line]] = {
        "learning rate": lambda run: _over_steps(run.metrics, "learning_rate"),
        "λ of attention": used,
        "gradient norm": lambda run: _over_steps(run.metrics, "grad_norm"),
        "tokens per second": lambda run: _over_steps(run.metrics, "tokens_per_second"),
    }

    def view(choice: Choice) -> list[Panel]:
        panels = []
        for title, points in measures.items():
            smooth = title in ("gradient norm", "tokens per second")
            lines = []
            for index, condition in enumerate(study.conditions):
                x, y = averaged(condition, points)
                colour = shade(index, len(study.conditions))
                lines.append(line_over(condition.name, x, y, colour, smooth))
            panels.append(Panel(title, "step", title + _SMOOTHED * smooth, lines))
        return panels

    return Figure(
        "settings",
        "What the optimizer did",
        "Learning rate, λ of attention (mean over layers and roles), gradient norm before clipping "
        "and speed (both as running mean over a thirtieth of the run); means over seeds. "
        f"{about(study)}{sampled(study)}",
        [],
        view,
    )
