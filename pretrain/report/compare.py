"""Means over seeds, and paired differences with intervals and corrected p-values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pretrain.report.load import Condition, RunData, Study

Measure = Callable[[RunData], float | None]

MEASURES: dict[str, tuple[str, Measure]] = {
    "perplexity": ("perplexity", lambda run: run.score("perplexity")),
    "bits_per_byte": ("bits/byte", lambda run: run.score("bits_per_byte")),
    "rank_qk": ("rank W_QK", lambda run: run.mean("qk", "pseudo_rank")),
    "rank_vp": ("rank W_VP", lambda run: run.mean("vp", "pseudo_rank")),
}
"""What is compared: title and value of a run."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    value: float
    error: float
    """Standard error of the mean; NaN for one seed."""
    n: int


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error (sample standard deviation / √n)."""
    n = len(values)
    if not n:
        return Mean(math.nan, math.nan, 0)
    value = sum(values) / n
    if n == 1:
        return Mean(value, math.nan, 1)
    variance = sum((x - value) ** 2 for x in values) / (n - 1)
    return Mean(value, math.sqrt(variance / n), n)


def condition_mean(condition: Condition, measure: Measure) -> Mean:
    """Over the seeds of a condition that have the figure."""
    found = [measure(run) for run in condition.runs]
    return mean_of([value for value in found if value is not None])


@dataclass(frozen=True)
class Difference:
    """A condition minus the baseline, seed by seed."""

    condition: Condition
    mean: float
    low: float
    """95 % interval by Student's t over the pairs; NaN for fewer than two."""
    high: float
    n: int
    p: float
    corrected: float
    """p after Holm's correction for the comparisons with this baseline."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def pairs_of(condition: Condition, baseline: Condition) -> list[tuple[RunData, RunData]]:
    """Runs of one seed that began with the same weights and saw the same samples in order."""
    others = {run.seed: run for run in baseline.runs}
    return [
        (run, others[run.seed])
        for run in condition.runs
        if run.seed in others and run.identity and run.identity == others[run.seed].identity
    ]


def unpaired(study: Study) -> list[str]:
    """Why runs of one seed were not paired."""
    notes = []
    for condition in study.conditions:
        others = {run.seed: run for run in study.baseline.runs}
        for run in condition.runs:
            other = others.get(run.seed)
            if condition is study.baseline or other is None:
                continue
            if not run.identity or not other.identity:
                lacking = run if not run.identity else other
                notes.append(f"not paired: {lacking.path} has no hashes of its start")
                continue
            for key in ("initial_weights", "data_order"):
                if run.identity[key] != other.identity[key]:
                    words = key.replace("_", " ")
                    notes.append(f"not paired: {run.path} and {other.path} differ in {words}")
    return notes


def differences_from(study: Study, measure: Measure) -> list[Difference]:
    """Every other condition against the baseline, in the study's order."""
    raw: list[tuple[Condition, list[float]]] = []
    for condition in study.conditions:
        if condition is not study.baseline:
            values = [(measure(a), measure(b)) for a, b in pairs_of(condition, study.baseline)]
            raw.append((condition, [a - b for a, b in values if a is not None and b is not None]))
    tests = [_t_test(values) for _, values in raw]
    corrected = holm([p for _, _, _, p in tests])
    return [
        Difference(condition, mean, low, high, len(values), p, fixed)
        for (condition, values), (mean, low, high, p), fixed in zip(
            raw, tests, corrected, strict=True
        )
    ]


def _t_test(values: list[float]) -> tuple[float, float, float, float]:
    """Mean, 95 % interval and two-sided p of differences, by Student's t."""
    found = mean_of(values)
    if found.n < 2:
        return found.value, math.nan, math.nan, math.nan
    from scipy.stats import t

    if found.error == 0:  # equal in every seed
        return found.value, found.value, found.value, 1.0 if found.value == 0 else 0.0
    half = float(t.ppf(0.975, found.n - 1)) * found.error
    p = 2 * float(t.sf(abs(found.value) / found.error, found.n - 1))
    return found.value, found.value - half, found.value + half, p


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; NaN stays NaN and counts as no comparison."""
    order = sorted(
        (index for index, p in enumerate(values) if not math.isnan(p)), key=lambda i: values[i]
    )
    result = [math.nan] * len(values)
    worst = 0.0
    for place, index in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - place) * values[index]))
        result[index] = worst
    return result
