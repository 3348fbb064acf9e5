"""Figures of training: losses, and what the optimizer did."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate

from pretrain.report.figure_parts import (
    about,
    mean_over,
    shade,
    some_of,
)
from pretrain.report.load import Condition, RunData, Study
from pretrain.report.spec import Choice, Figure, Panel, Series

_MOST_POINTS = 1000
"""Largest number of points of a line over the steps, evenly spaced."""


def losses(study: Study) -> Figure:
    """Training and held-out loss."""

    def view(choice: Choice) -> list[Panel]:
        count = len(study.conditions)
        training, held = [], []
        for index, condition in enumerate(study.conditions):
            colour = shade(index, count)
            x, y = _averaged(condition, lambda run: [(r["step"], r["loss"]) for r in run.metrics])
            training.append(_line(condition.name, x, _smooth(y), colour))
            x, y = _averaged(condition, lambda run: [(r["step"], r["loss"]) for r in run.held_out])
            held.append(_line(condition.name, x, y, colour))
        return [
            Panel("training, running mean", "step", "loss, nats per token", training),
            Panel("held out, fixed sample", "step", "loss, nats per token", held),
        ]

    return Figure(
        "loss",
        "Loss",
        f"Training loss (mean over seeds, running mean over a thirtieth of the run) and loss on a "
        f"fixed sample of held-out documents. {about(study)}",
        [],
        view,
    )


def _averaged(
    condition: Condition, points: Callable[[RunData], list[tuple[int, float]]]
) -> tuple[list[float], list[float]]:
    found: dict[int, list[float]] = defaultdict(list)
    for run in condition.runs:
        for step, value in points(run):
            found[step].append(value)
    steps = sorted(found)
    return [float(step) for step in steps], [mean_over(found[step]) for step in steps]


def _smooth(values: list[float]) -> list[float]:
    """Running mean over the last thirtieth of the run; values that are not finite do not count."""
    finite = [math.isfinite(value) for value in values]
    sums = [0.0, *accumulate(v if ok else 0.0 for v, ok in zip(values, finite, strict=True))]
    counts = [0, *accumulate(map(int, finite))]
    width = max(1, len(values) // 30) + 1
    starts = [max(0, i - width) for i in range(1, len(values) + 1)]
    return [
        (sums[i] - sums[start]) / (counts[i] - counts[start])
        if counts[i] > counts[start]
        else math.nan
        for i, start in enumerate(starts, 1)
    ]


def _line(name: str, x: list[float], y: list[float], colour: float) -> Series:
    """A line with only as many points as a reader can see."""
    kept = some_of(range(len(x)), _MOST_POINTS)
    return Series(name, [x[i] for i in kept], [y[i] for i in kept], colour)


def settings(study: Study) -> Figure:
    """Learning rate, λ, gradient norm and speed."""

    def used(run: RunData) -> list[tuple[int, float]]:
        rows: dict[int, list[float]] = defaultdict(list)
        for row in run.heads:
            rows[row["step"]].append((row["decay_a"] + row["decay_b"]) / 2)
        return [(step, mean_over(values)) for step, values in sorted(rows.items())]

    measures: dict[str, Callable[[RunData], list[tuple[int, float]]]] = {
        "learning rate": lambda run: [(r["step"], r["learning_rate"]) for r in run.metrics],
        "λ of attention": used,
        "gradient norm": lambda run: [(r["step"], r["grad_norm"]) for r in run.metrics],
        "tokens per second": lambda run: [(r["step"], r["tokens_per_second"]) for r in run.metrics],
    }

    def view(choice: Choice) -> list[Panel]:
        panels = []
        for title, points in measures.items():
            lines = []
            for index, condition in enumerate(study.conditions):
                x, y = _averaged(condition, points)
                y = _smooth(y) if title in ("gradient norm", "tokens per second") else y
                lines.append(_line(condition.name, x, y, shade(index, len(study.conditions))))
            panels.append(Panel(title, "step", title, lines))
        return panels

    return Figure(
        "settings",
        "What the optimizer did",
        "Learning rate, λ of attention (mean over layers and roles), gradient norm before clipping "
        f"and speed; means over seeds. {about(study)}",
        [],
        view,
    )
