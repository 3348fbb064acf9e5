"""Parts that figures share: products, colours, samples and means."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pretrain.ranks.columns import AnyRow
from pretrain.report.load import Study
from pretrain.report.runs import RunData
from pretrain.runs.loop import NOT_RECORDED

PRODUCTS = {"qk": "W_QK", "vp": "W_VP"}


def shade(index: int, count: int) -> float:
    """A position on the colour scale for the index-th of a few ordered items."""
    return 0.9 * index / max(1, count - 1)


def layers_of(study: Study) -> list[int]:
    """Layers that every run has."""
    return sorted({row["layer"] for row in study.runs[0].final})


def pick(rows: Iterable[AnyRow], product: str, layer: int | None) -> list[AnyRow]:
    return [
        row
        for row in rows
        if row["product"] == product and (layer is None or row["layer"] == layer)
    ]


def mean_over(values: list[float]) -> float:
    """Mean of the finite values; NaN if there are none. The report's notes name the others."""
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else math.nan


def ends(values: list[float]) -> tuple[float, float]:
    """Least and greatest of the finite values; NaN if there are none."""
    finite = [value for value in values if not math.isnan(value)] or [math.nan]
    return min(finite), max(finite)


def counted(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def sampled(study: Study, shown: int | None = None) -> str:
    """A sentence for captions if the shown steps are a sample of the measured ones, else nothing.

    Args:
        shown: number of shown steps of a figure that shows fewer than the others.
    """
    run = max(study.runs, key=lambda one: one.measured)
    count = len({row["step"] for row in run.heads}) if shown is None else shown
    if count >= run.measured:
        return ""
    return f" Shown are {count:,} of the {run.measured:,} measured steps."


def about(study: Study) -> str:
    """A description of the runs, for captions."""
    first, runs = study.runs[0], study.runs
    seeds = {run.seed for run in runs if run.records("seed")}
    unknown = sum(not run.records("seed") for run in runs)
    model = first.config.model
    dialect = model.dialect.value if first.records("model.dialect") else "a model"
    some = "" if not unknown else f" ({counted(unknown, 'run')} without a recorded seed)"
    return (
        f"{counted(len(runs), 'run')}, {counted(len(study.conditions), 'condition')}, n = "
        f"{counted(len(seeds), 'seed')}{some}; {dialect} of "
        f"{counted(model.num_layers, 'layer')} x "
        f"{counted(model.num_attention_heads, 'head')}, width {model.hidden_size}, "
        f"{tokens_of(first)} per run."
    )


def tokens_of(run: RunData) -> str:
    """``1,024 tokens``, or that their number is not recorded."""
    return f"number of tokens {NOT_RECORDED}" if run.tokens is None else f"{run.tokens:,} tokens"
