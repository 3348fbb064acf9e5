"""The tables of a report as plain cells: Table 1, paired differences, subsets, settings."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from models.roles import ALIASES
from pretrain.config import differences, value_at
from pretrain.report.compare import (
    MEASURES,
    Difference,
    Mean,
    Measure,
    condition_mean,
    differences_from,
)
from pretrain.report.load import Condition, Study


@dataclass(frozen=True)
class Cell:
    """A value as text, with what a page may do with it."""

    text: str
    shade: float = 0.0
    """-1 to 1: less or more than the baseline, in size order; 0: no colour."""
    mark: bool = False
    """The interval excludes 0."""


@dataclass(frozen=True)
class DataTable:
    """A table with a caption."""

    key: str
    title: str
    caption: str
    head: list[str]
    rows: list[list[Cell]]
    raw: list[dict[str, Any]] = field(default_factory=list)
    """The same values unrounded, for CSV."""


def tables_of(study: Study) -> list[DataTable]:
    """Every table, most important first."""
    found = [summary(study)]
    for key in ("perplexity", "bits_per_byte"):
        title, measure = MEASURES[key]
        found += [table_one(study, key, title, measure)] if _scored(study, measure) else []
    found.append(paired(study))
    return [*found, *subsets(study), *configuration(study), environment(study)]


def _scored(study: Study, measure: Measure) -> bool:
    return any(measure(run) is not None for run in study.runs)


def summary(study: Study) -> DataTable:
    """One row a condition."""
    rows, raw = [], []
    columns = {
        "λ": lambda run: run.decay,
        "exposure Σηλ": lambda run: run.exposure,
        "rank W_QK": lambda run: run.mean("qk", "pseudo_rank"),
        "rank W_VP": lambda run: run.mean("vp", "pseudo_rank"),
        "balance QK": lambda run: run.mean("qk", "balance"),
        "balance VP": lambda run: run.mean("vp", "balance"),
        "perplexity": MEASURES["perplexity"][1],
        "bits/byte": MEASURES["bits_per_byte"][1],
    }
    for condition in study.conditions:
        cells = [Cell(condition.name), Cell(str(len(condition.runs)))]
        values: dict[str, Any] = {"condition": condition.name, "seeds": len(condition.runs)}
        for title, measure in columns.items():
            mean = condition_mean(condition, measure)
            cells.append(Cell(_plus_minus(mean, plain=title in ("λ", "exposure Σηλ"))))
            values |= {title: mean.value, f"{title} (standard error)": mean.error}
        rows.append(cells)
        raw.append(values)
    return DataTable(
        "summary",
        "Conditions",
        "Means over seeds ± standard error of the mean; pseudo-rank and balance (nuclear norm / "
        "its bound) over all heads at the end of training; perplexity and bits per byte on the "
        "held-out split.",
        ["condition", "seeds", *columns],
        rows,
        raw,
    )


def table_one(study: Study, key: str, title: str, measure: Measure) -> DataTable:
    """λ_attention x λ_mlp (the paper's Table 1), or one row a condition where that is no grid."""
    versus = {one.condition.name: one for one in differences_from(study, measure)}
    places: dict[tuple[float, float], Condition] = {}
    for condition in study.conditions:
        place = (condition.mean_of(lambda run: run.mlp_decay), condition.decay)
        places.setdefault((round(place[0], 9), round(place[1], 9)), condition)
    span = max((abs(one.mean) for one in versus.values()), default=0.0)

    def cell(condition: Condition | None) -> Cell:
        if condition is None:
            return Cell("–")
        one = versus.get(condition.name)
        shade = one.mean / span if one and span and not math.isnan(one.mean) else 0.0
        text = _plus_minus(condition_mean(condition, measure))
        return Cell(text, shade, bool(one and one.is_clear))

    raw = [
        {
            "condition": condition.name,
            "lambda_mlp": condition.mean_of(lambda run: run.mlp_decay),
            "lambda_attention": condition.decay,
            **_numbers(condition_mean(condition, measure)),
        }
        for condition in study.conditions
    ]
    rows_of, columns = sorted({row for row, _ in places}), sorted({c for _, c in places})
    if len(places) == len(study.conditions) and _varies_by_role(study):
        head = ["λ_mlp \\ λ_attention", *(f"{column:g}" for column in columns)]
        rows = [
            [Cell(f"{row:g}"), *(cell(places.get((row, column))) for column in columns)]
            for row in rows_of
        ]
    else:
        head = ["condition", title]
        rows = [[Cell(condition.name), cell(condition)] for condition in study.conditions]
    return DataTable(
        key,
        f"Held-out {title}",
        f"{title} on the {_split(study)} split, mean over seeds ± standard error (the paper's "
        f"Table 1). Coloured by the paired difference from the baseline ({study.baseline.name}); "
        "* where its 95 % interval excludes 0.",
        head,
        rows,
        raw,
    )


def _varies_by_role(study: Study) -> bool:
    """Whether conditions differ in constant λ alone: then λ names them."""
    head = "optimizer.weight_decay."
    words = {*ALIASES, "default"}
    return all(
        key.startswith(head) and key.removeprefix(head) in words
        for condition in study.conditions
        for key in condition.values
    )


def _split(study: Study) -> str:
    scored = next((run.evaluation for run in study.runs if run.evaluation), None)
    return str(scored["split"]) if scored else "held-out"


def paired(study: Study) -> DataTable:
    """Differences from the baseline, seed by seed."""
    rows, raw = [], []
    for title, measure in MEASURES.values():
        if not _scored(study, measure):
            continue
        found = differences_from(study, measure)
        span = max((abs(one.mean) for one in found if not math.isnan(one.mean)), default=0.0)
        for one in found:
            shade = one.mean / span if span and not math.isnan(one.mean) else 0.0
            rows.append(_difference_cells(title, one, shade))
            raw.append(
                {
                    "figure": title,
                    "condition": one.condition.name,
                    "baseline": study.baseline.name,
                    "pairs": one.n,
                    "difference": one.mean,
                    "low": one.low,
                    "high": one.high,
                    "p": one.p,
                    "p_holm": one.corrected,
                }
            )
    return DataTable(
        "differences",
        "Paired differences from the baseline",
        f"Each condition minus the baseline ({study.baseline.name}), seed by seed: runs of one "
        "seed share their first weights and the order of their data. 95 % intervals and p by "
        "Student's t over the pairs; the last column is corrected for the number of comparisons "
        "with the baseline, figure by figure (Holm). * where the interval excludes 0.",
        ["figure", "condition", "pairs", "difference", "95 % interval", "p", "p, Holm"],
        rows,
        raw,
    )


def _difference_cells(title: str, one: Difference, shade: float) -> list[Cell]:
    interval = "–" if math.isnan(one.low) else f"[{one.low:+.4g}, {one.high:+.4g}]"
    return [
        Cell(title),
        Cell(one.condition.name),
        Cell(str(one.n)),
        Cell("–" if math.isnan(one.mean) else f"{one.mean:+.4g}", shade, one.is_clear),
        Cell(interval),
        Cell(_p(one.p)),
        Cell(_p(one.corrected)),
    ]


def _p(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def subsets(study: Study) -> list[DataTable]:
    """Perplexity and bits per byte of every subset of the data."""
    names = sorted(
        {name for run in study.runs for name in (run.evaluation or {}).get("subsets", {})}
    )
    if len(names) < 2:
        return []
    found = []
    for key in ("perplexity", "bits_per_byte"):
        title = MEASURES[key][0]
        rows, raw = [], []
        for name in names:
            measure = _subset_measure(key, name)
            versus = {one.condition.name: one for one in differences_from(study, measure)}
            span = max((abs(d.mean) for d in versus.values() if not math.isnan(d.mean)), default=0)
            cells = [Cell(name)]
            for condition in study.conditions:
                one, mean = versus.get(condition.name), condition_mean(condition, measure)
                shade = one.mean / span if one and span and not math.isnan(one.mean) else 0.0
                cells.append(Cell(_plus_minus(mean), shade, bool(one and one.is_clear)))
                raw.append({"subset": name, "condition": condition.name, **_numbers(mean)})
            rows.append(cells)
        found.append(
            DataTable(
                f"subsets-{key}",
                f"Held-out {title} by subset",
                f"{title} of every subset, mean over seeds ± standard error; colour and mark as "
                "above, subset by subset.",
                ["subset", *(condition.name for condition in study.conditions)],
                rows,
                raw,
            )
        )
    return found


def _subset_measure(key: str, subset: str) -> Measure:
    return lambda run: run.score(key, subset)


def configuration(study: Study) -> list[DataTable]:
    """What differs between the runs' recipes, and nothing else."""
    runs = study.runs
    sections = tuple(type(runs[0].config).model_fields)
    keys: dict[str, None] = {}
    for run in runs[1:]:
        keys |= dict.fromkeys(differences(runs[0].config, run.config, sections))
    if not keys:
        return []
    rows = [
        [Cell(run.path.name), *(Cell(_short(value_at(run.config, key))) for key in keys)]
        for run in runs
    ]
    raw = [
        {"run": run.path.name, **{key: value_at(run.config, key) for key in keys}} for run in runs
    ]
    caption = "Keys whose values are not the same in all runs."
    return [DataTable("configuration", "What differs", caption, ["run", *keys], rows, raw)]


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def environment(study: Study) -> DataTable:
    """Machine and versions, and how many runs had each."""
    counts: dict[str, dict[str, int]] = {}
    for run in study.runs:
        flat = {k: v for k, v in run.environment.items() if k not in ("started", "versions")}
        flat |= run.environment.get("versions", {})
        for key, value in flat.items():
            part = counts.setdefault(key, {})
            part[str(value)] = part.get(str(value), 0) + 1
    rows = [
        [Cell(key), Cell("; ".join(v if n == len(study.runs) else f"{v} ({n} runs)"
                                    for v, n in values.items()))]
        for key, values in counts.items()
    ]  # fmt: skip
    raw = [
        {"what": key, "value": v, "runs": n}
        for key, part in counts.items()
        for v, n in part.items()
    ]
    caption = "Of each run's last start."
    return DataTable("environment", "Environment", caption, ["", ""], rows, raw)


def _plus_minus(mean: Mean, plain: bool = False) -> str:
    if math.isnan(mean.value):
        return "–"
    if plain:
        return f"{mean.value:.4g}"
    digits = 4 if abs(mean.value) < 10 else 2
    if math.isnan(mean.error):
        return f"{mean.value:.{digits}f}"
    return f"{mean.value:.{digits}f} ± {mean.error:.{digits}f}"


def _numbers(mean: Mean) -> dict[str, Any]:
    return {"mean": mean.value, "standard_error": mean.error, "n": mean.n}
