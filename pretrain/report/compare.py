"""Means over seeds, and paired differences with intervals and corrected p-values."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pretrain.report.comparable import differences_of_pair
from pretrain.report.load import Condition, RunData, Study
from pretrain.runs.loop import NOT_RECORDED

LEVEL = 0.05
"""A difference is clear if its corrected p is below this, over `FEW` pairs or more."""
_ROUNDING = 1e-12
"""A spread below this share of the figures themselves is rounding, not variance."""
FEW = 3
"""With fewer pairs, a test has little meaning, and no difference is called clear."""
Measure = Callable[[RunData], float | None]

MEASURES: dict[str, tuple[str, Measure]] = {
    "perplexity": ("perplexity", lambda run: run.score("perplexity")),
    "bits_per_byte": ("bits/byte", lambda run: run.score("bits_per_byte")),
    "rank_qk": ("rank W_QK", lambda run: run.mean("qk", "pseudo_rank")),
    "rank_vp": ("rank W_VP", lambda run: run.mean("vp", "pseudo_rank")),
}
"""The figures that are compared: title, and a function that gives a run's value."""


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
    # hypot neither overflows nor underflows where squares would.
    return Mean(value, math.hypot(*(x - value for x in values)) / math.sqrt((n - 1) * n), n)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def condition_mean(condition: Condition, measure: Measure) -> Mean:
    """Mean over the seeds of a condition whose figure is finite."""
    values = [measure(run) for run in condition.runs]
    return mean_of([value for value in values if value is not None and math.isfinite(value)])


@dataclass(frozen=True)
class Difference:
    """A condition minus the baseline, seed by seed."""

    condition: Condition
    mean: float
    low: float
    """95 % interval by Student's t over the pairs; NaN for fewer than two pairs, or equal ones."""
    high: float
    n: int
    p: float
    corrected: float
    """p after Holm's correction for the comparisons that are made together."""

    @property
    def is_clear(self) -> bool:
        """Whether the corrected p of enough pairs is below `LEVEL`: what star and colour mean."""
        return self.n >= FEW and self.corrected < LEVEL

    @property
    def why_untested(self) -> str:
        """Why there is no p; empty if there is one."""
        if not math.isnan(self.p):
            return ""
        return (
            "fewer than two pairs"
            if self.n < 2
            else f"{self.n} equal differences, without a variance"
        )


def pairs_of(condition: Condition, baseline: Condition) -> list[tuple[RunData, RunData]]:
    """Runs of one seed that differ only in their recipe (`differences_of_pair`)."""
    by_seed = _by_seed(baseline)
    only = differing(condition, baseline)
    return [
        (run, by_seed[run.seed])
        for run in condition.runs
        if run.records("seed")
        and run.seed in by_seed
        and not differences_of_pair(run, by_seed[run.seed], only)
    ]


def _by_seed(baseline: Condition) -> dict[int, RunData]:
    return {run.seed: run for run in baseline.runs if run.records("seed")}


def differing(condition: Condition, baseline: Condition) -> set[str]:
    """Keys of the recipe in which two conditions differ."""
    return {key for key, value in condition.values.items() if value != baseline.values[key]}


def unpaired(study: Study) -> list[str]:
    """Notes about runs that are in no pair, with the reason."""
    notes = []
    by_seed = _by_seed(study.baseline)
    for condition in study.conditions:
        if condition is study.baseline:
            continue
        only = differing(condition, study.baseline)
        for run in condition.runs:
            if not run.records("seed"):
                notes.append(f"not paired: {run.path}: its seed is {NOT_RECORDED}")
                continue
            partner = by_seed.get(run.seed)
            if partner is None:
                notes.append(f"not paired: {run.path}: the baseline has no run of seed {run.seed}")
                continue
            for reason in differences_of_pair(run, partner, only):
                notes.append(f"not paired: {run.path} and {partner.path}: {reason}")
    return notes


def uncounted(study: Study) -> list[str]:
    """Notes about figures that are not finite, comparisons without a test, and few pairs.

    A condition without a pair is not among those with few: `unpaired` says why it has none.
    """
    notes: list[str] = []
    few: dict[str, int] = {}
    for title, measure in MEASURES.values():
        for run in study.runs:
            value = measure(run)
            if value is not None and not math.isfinite(value):
                why = f" ({run.nonfinite[0]}: weights are not finite)" if run.nonfinite else ""
                notes.append(f"left out of {title}: {run.path}: its value is {value}{why}")
        differences = differences_from(study, measure)
        if not any(_finite(measure(run)) for run in study.runs):
            continue
        few |= {
            difference.condition.name: difference.n
            for difference in differences
            if difference.n < FEW and pairs_of(difference.condition, study.baseline)
        }
        untested = [difference for difference in differences if difference.why_untested]
        if untested and (
            len(untested) < len(differences) or any(difference.n > 1 for difference in untested)
        ):
            words = "; ".join(
                f"{difference.condition.name} ({difference.why_untested})"
                for difference in untested
            )
            notes.append(
                f"{title}: no p for {words}; Holm's correction counts the other "
                f"{len(differences) - len(untested)} of {len(differences)} comparisons"
            )
    return notes + _of_few_pairs(few)


def _of_few_pairs(few: dict[str, int]) -> list[str]:
    """Notes about conditions with few pairs: with one, there is nothing that could mislead."""
    single = [name for name, n in few.items() if n == 1]
    others = [f"{name} ({n})" for name, n in few.items() if n != 1]
    notes = []
    if single:
        notes.append(
            f"one pair: no interval and no p: {', '.join(single)}; use {FEW} seeds or more"
        )
    if others:
        notes.append(
            f"fewer than {FEW} pairs, so intervals and p have little meaning: {', '.join(others)}; "
            f"use {FEW} seeds or more"
        )
    return notes


def differences_from(study: Study, measure: Measure) -> list[Difference]:
    """Differences of every other condition from the baseline, in the study's order."""
    return differences_of([measure], study)[0]


def differences_of(measures: Sequence[Measure], study: Study) -> list[list[Difference]]:
    """As `differences_from` for several figures, corrected for all comparisons together."""
    conditions = [condition for condition in study.conditions if condition is not study.baseline]
    pairs = [pairs_of(condition, study.baseline) for condition in conditions]
    tests = [[t_test(_values(measure, part)) for part in pairs] for measure in measures]
    corrected = iter(holm([test.p for line in tests for test in line]))
    return [
        [
            Difference(condition, test.mean, test.low, test.high, test.n, test.p, next(corrected))
            for condition, test in zip(conditions, line, strict=True)
        ]
        for line in tests
    ]


def _values(measure: Measure, pairs: list[tuple[RunData, RunData]]) -> list[tuple[float, float]]:
    """The figures of both runs, for every pair in which both are finite."""
    values = [(measure(run), measure(other)) for run, other in pairs]
    return [
        (a, b)
        for a, b in values
        if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)
    ]


@dataclass(frozen=True)
class Test:
    """A t test of paired differences."""

    n: int
    mean: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


def t_test(pairs: Sequence[tuple[float, float]]) -> Test:
    """Mean of a − b, its 95 % interval and two-sided p, by Student's t.

    Returns:
        Interval and p are NaN for fewer than two pairs, and for differences that are equal up to
        rounding: without a variance there is no test.
    """
    mean = mean_of([a - b for a, b in pairs])
    if mean.n < 2:
        return Test(mean.n, mean.value)
    scale = max(max(abs(a), abs(b)) for a, b in pairs)
    if mean.error * math.sqrt(mean.n) <= _ROUNDING * scale:
        return Test(mean.n, mean.value)
    from scipy.stats import t

    half = float(t.ppf(0.975, mean.n - 1)) * mean.error
    p = 2 * float(t.sf(abs(mean.value) / mean.error, mean.n - 1))
    p = max(p, sys.float_info.min)  # the tail underflows, but is not 0
    return Test(mean.n, mean.value, mean.value - half, mean.value + half, p)


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
