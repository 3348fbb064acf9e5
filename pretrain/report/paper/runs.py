"""Reads run folders for the figures of trained models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pretrain.config.recipe import value_at
from pretrain.errors import UsageError
from pretrain.report.load import RunData, load_run
from pretrain.runs.folder import CONFIG

ATTENTION = "optimizer.weight_decay.attention"
MLP = "optimizer.weight_decay.mlp"
PRODUCTS = {"qk": "W$_{QK}$", "vp": "W$_{VP}$"}


def load_runs(folder: Path) -> list[RunData]:
    """Every finished run in a sweep's folder, in order of attention decay, then seed.

    Raises:
        UsageError: if there is none.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give a folder of runs")
    runs = [load_run(path) for path in sorted(folder.iterdir()) if (path / CONFIG).is_file()]
    runs = [run for run in runs if run.is_finished]
    if not runs:
        raise UsageError(f"{folder}: contains no finished runs")
    return sorted(runs, key=lambda run: (given_decay(run), run.seed))


def given_decay(run: RunData, key: str = ATTENTION) -> float:
    """λ of the recipe at a key."""
    value = value_at(run.config, key)
    if value is None:
        value = value_at(run.config, "optimizer.weight_decay.default")
    return float(value)


def values(
    run: RunData,
    product: str,
    column: str,
    layer: int | None = None,
    step: int | None = None,
    level: str = "head",
) -> list[float]:
    """A column of the rank table for every head.

    Args:
        layer: None: all.
        step: None: the last measured.
    """
    when = max(row["step"] for row in run.ranks) if step is None else step
    return [
        row[column]
        for row in run.ranks
        if row["step"] == when
        and row["product"] == product
        and row["level"] == level
        and layer in (None, row["layer"])
    ]


def mean(numbers: Sequence[float]) -> float:
    """Mean; NaN if there are no values."""
    return sum(numbers) / len(numbers) if numbers else math.nan


def series(
    run: RunData, product: str, column: str, layer: int | None = None
) -> tuple[list[int], list[float]]:
    """Mean over heads at every measured step."""
    steps = sorted({row["step"] for row in run.ranks})
    return steps, [mean(values(run, product, column, layer, step)) for step in steps]


def largest_rise(falling: Sequence[float]) -> float:
    """The largest rise in a sequence that should fall; 0 or less if it never rises."""
    return max((later - earlier for earlier, later in pairwise(falling)), default=0.0)


def arrow(numbers: Sequence[float], digits: int = 3) -> str:
    """``0.672 → 0.510 → 0.036``."""
    return " → ".join(f"{value:.{digits}f}" for value in numbers)


def by_decay(runs: list[RunData]) -> dict[float, list[RunData]]:
    """Runs by λ of attention, rising."""
    groups: dict[float, list[RunData]] = {}
    for run in runs:
        groups.setdefault(given_decay(run), []).append(run)
    return groups


def colours(count: int) -> list[Any]:
    """Colours of conditions in order, from dark to light."""
    import matplotlib

    scale = matplotlib.colormaps["viridis"]
    return [scale(0.9 * index / max(1, count - 1)) for index in range(count)]


def long_rows(runs: list[RunData], columns: Sequence[str]) -> list[dict[str, Any]]:
    """One row per run, step, layer and product, with means over heads, for CSV."""
    rows = []
    for run in runs:
        keys = sorted({(row["step"], row["layer"]) for row in run.ranks})
        for step, layer in keys:
            for product in PRODUCTS:
                cells = {
                    column: mean(values(run, product, column, layer, step)) for column in columns
                }
                head = {"run": run.path.name, "decay": given_decay(run), "exposure": run.exposure}
                rows.append({**head, "step": step, "layer": layer, "product": product, **cells})
    return rows
