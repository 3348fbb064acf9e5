"""The tables of a report as plain cells: Table 1, paired differences, subsets, settings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from models.roles import ALIASES
from pretrain.report.cells import Cell, DataTable
from pretrain.report.compare import (
    FEW,
    LEVEL,
    MEASURES,
    Difference,
    Mean,
    Measure,
    condition_mean,
    differences_from,
    differences_of,
)
from pretrain.report.context_tables import configuration, data_seen, environment
from pretrain.report.load import Condition, Study


def tables_of(study: Study) -> list[DataTable]:
    """Every table, most important first."""
    tables = [summary(study)]
    for key in ("perplexity", "bits_per_byte"):
        title, measure = MEASURES[key]
        tables += [table_one(study, key, title, measure)] if _scored(study, measure) else []
    tables.append(paired(study))
    return [*tables, *subsets(study), *configuration(study), *data_seen(study), environment(study)]


def _scored(study: Study, measure: Measure) -> bool:
    return any(measure(run) is not None for run in study.runs)


def summary(study: Study) -> DataTable:
    """One row per condition."""
    rows, raw = [], []
    columns = {
        "λ": lambda run: run.decay,
        "exposure Σηλ": lambda run: run.exposure,
        **_since_fork(study),
        "perplexity": MEASURES["perplexity"][1],
        "bits/byte": MEASURES["bits_per_byte"][1],
        "rank W_QK": lambda run: run.mean("qk", "pseudo_rank"),
        "rank W_VP": lambda run: run.mean("vp", "pseudo_rank"),
        "balance QK": lambda run: run.mean("qk", "balance"),
        "balance VP": lambda run: run.mean("vp", "balance"),
        **_pair_balance(study),
    }
    for condition in study.conditions:
        cells = [Cell(condition.name), Cell(str(len(condition.runs)))]
        values: dict[str, Any] = {"condition": condition.name, "seeds": len(condition.runs)}
        for title, measure in columns.items():
            mean = condition_mean(condition, measure)
            plain = title == "λ" or title.startswith("exposure")
            cells.append(Cell(_plus_minus(mean, len(condition.runs), plain)))
            values |= {
                title: mean.value,
                f"{title} (standard error)": mean.error,
                f"{title} (seeds)": mean.n,
            }
        rows.append(cells)
        raw.append(values)
    return DataTable(
        "summary",
        "Conditions",
        "Means over seeds ± standard error of the mean; (n) is the number of seeds if some have no "
        "figure. λ is the applied λ of attention, Σ rate·λ / Σ rate over the updates"
        f"{_OF_FORKS if _since_fork(study) else ''}.{_policies(study)} Values at "
        "the end of training: pseudo-rank over all heads; balance (nuclear norm / its bound) over "
        "all heads, or over groups of heads that share keys, to which the law applies; – with "
        "QK-norm; perplexity and bits per byte on the held-out split.",
        ["condition", "seeds", *columns],
        rows,
        raw,
    )


_OF_FORKS = (
    "; of a fork, over its own updates. Its exposure Σηλ counts from the beginning of its trunk, "
    "because ranks depend on all of it; its exposure since the fork is what a sweep file gives"
)


def _policies(study: Study) -> str:
    """A sentence about the policies of decay, if a run has any."""
    kinds = {
        condition.name: ", ".join(
            dict.fromkeys(
                policy.kind
                for run in condition.runs
                for policy in run.config.optimizer.weight_decay.policies
            )
        )
        for condition in study.conditions
    }
    some = {name: kind for name, kind in kinds.items() if kind}
    if not some:
        return ""
    if len(set(kinds.values())) == 1:
        return f" λ was moved by policies: {next(iter(some.values()))}."
    return f" λ was moved by policies: {'; '.join(f'{k} in {name}' for name, k in some.items())}."


def _since_fork(study: Study) -> dict[str, Measure]:
    """The exposure of a fork's own updates, beside λ of the same updates."""
    if not any(run.forked_at for run in study.runs):
        return {}
    return {"exposure since the fork": lambda run: run.own_exposure if run.forked_at else None}


def _pair_balance(study: Study) -> dict[str, Measure]:
    """The balance of rotary pairs, to which the law applies with rotary positions."""
    if not any(run.config.model.rotary_dim for run in study.runs):
        return {}
    return {"balance QK, rotary pairs": lambda run: run.mean("qk", "rope_pair_balance")}


def table_one(study: Study, key: str, title: str, measure: Measure) -> DataTable:
    """λ_attention x λ_mlp (the paper's Table 1), or one row per condition if it is not a grid."""
    versus = {
        difference.condition.name: difference for difference in differences_from(study, measure)
    }
    places: dict[tuple[float, float], Condition] = {}
    for condition in study.conditions:
        place = (condition.mean_of(lambda run: run.mlp_decay), condition.decay)
        places.setdefault((round(place[0], 9), round(place[1], 9)), condition)
    span = _span(versus.values())

    def cell(condition: Condition | None) -> Cell:
        if condition is None:
            return Cell("–")
        difference = versus.get(condition.name)
        text = _plus_minus(condition_mean(condition, measure), len(condition.runs))
        return Cell(text, _shade(difference, span), bool(difference and difference.is_clear))

    raw = [
        {
            "condition": condition.name,
            "lambda_mlp": condition.mean_of(lambda run: run.mlp_decay),
            "lambda_attention": condition.decay,
            **_numbers(condition_mean(condition, measure)),
            **_against(versus.get(condition.name)),
        }
        for condition in study.conditions
    ]
    rows_of, columns = sorted({row for row, _ in places}), sorted({c for _, c in places})
    if len(places) == len(study.conditions) and _varies_by_role(study):
        head = ["λ_mlp \\ λ_attention", *_short(columns)]
        rows = [
            [Cell(text), *(cell(places.get((row, column))) for column in columns)]
            for row, text in zip(rows_of, _short(rows_of), strict=True)
        ]
    else:
        head = ["condition", title]
        rows = [[Cell(condition.name), cell(condition)] for condition in study.conditions]
    return DataTable(
        key,
        f"Held-out {title}",
        f"{title} on the {_split(study)} split, mean over seeds ± standard error (as in "
        f"the paper's Table 1). {_CLEAR} for the number of conditions. On the page, the colour of "
        f"a mean shows its paired difference from the baseline ({study.baseline.name}).",
        head,
        rows,
        raw,
    )


def _short(values: list[float]) -> list[str]:
    """Numbers with four digits, as in the table of conditions, or with those that tell them
    apart."""
    for digits in (4, 6, 9):
        texts = [f"{value:.{digits}g}" for value in values]
        if len(set(texts)) == len(texts):
            break
    return texts


_CLEAR = (
    f"*: p < {LEVEL:g} over {FEW} pairs or more for the difference from the baseline, corrected "
    "(Holm)"
)


def _span(differences: Iterable[Difference]) -> float:
    """The largest clear difference."""
    return max(
        (abs(difference.mean) for difference in differences if difference.is_clear), default=0.0
    )


def _shade(difference: Difference | None, span: float) -> float:
    return difference.mean / span if difference and difference.is_clear and span else 0.0


def _against(difference: Difference | None) -> dict[str, Any]:
    """A difference from the baseline, for CSV; empty cells for the baseline itself."""
    if difference is None:
        return dict.fromkeys(("pairs", "difference", "p", "p_holm", "clear"))
    return {
        "pairs": difference.n,
        "difference": difference.mean,
        "p": difference.p,
        "p_holm": difference.corrected,
        "clear": difference.is_clear,
    }


def _varies_by_role(study: Study) -> bool:
    """Whether conditions differ only in a constant λ: then λ names them."""
    head = "optimizer.weight_decay."
    words = {*ALIASES, "default"}
    return all(
        key.startswith(head) and key.removeprefix(head) in words
        for condition in study.conditions
        for key in condition.values
    )


def _split(study: Study) -> str:
    scored = next((run.evaluation for run in study.runs if run.evaluation), None)
    return str(scored.get("split", "held-out")) if scored else "held-out"


_OF_DIFFERENCES = (
    "figure", "condition", "baseline", "pairs", "difference", "low", "high", "p", "p_holm", "clear",
)  # fmt: skip


def paired(study: Study) -> DataTable:
    """Differences from the baseline, seed by seed."""
    rows, raw = [], []
    for title, measure in MEASURES.values():
        if not _scored(study, measure):
            continue
        differences = differences_from(study, measure)
        span = _span(differences)
        for difference in differences:
            rows.append(_difference_cells(title, difference, _shade(difference, span)))
            raw.append(
                {
                    "figure": title,
                    "condition": difference.condition.name,
                    "baseline": study.baseline.name,
                    "pairs": difference.n,
                    "difference": difference.mean,
                    "low": difference.low,
                    "high": difference.high,
                    "p": difference.p,
                    "p_holm": difference.corrected,
                    "clear": difference.is_clear,
                }
            )
    return DataTable(
        "differences",
        "Paired differences from the baseline",
        f"Each condition minus the baseline ({study.baseline.name}), seed by seed: runs of one "
        "seed share their initial weights (a fork has those of its trunk) and the order of their "
        "data. 95 % intervals and p are by "
        "Student's t over the pairs, not corrected; the last column is corrected for the number "
        f"of comparisons with the baseline, figure by figure (Holm). *: below {LEVEL:g}, over "
        f"{FEW} pairs or more. –: no test, with fewer than two pairs or equal differences.",
        ["figure", "condition", "pairs", "difference", "95 % interval", "p", "p, Holm"],
        rows,
        raw,
        _OF_DIFFERENCES,
    )


def _difference_cells(title: str, difference: Difference, shade: float) -> list[Cell]:
    interval = (
        "–" if math.isnan(difference.low) else f"[{difference.low:+.4g}, {difference.high:+.4g}]"
    )
    return [
        Cell(title),
        Cell(difference.condition.name),
        Cell(str(difference.n)),
        Cell(
            "–" if math.isnan(difference.mean) else f"{difference.mean:+.4g}",
            shade,
            difference.is_clear,
        ),
        Cell(interval),
        Cell(_p(difference.p)),
        Cell(_p(difference.corrected)),
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
    tables = []
    for key in ("perplexity", "bits_per_byte"):
        title = MEASURES[key][0]
        rows, raw = [], []
        measures = [_subset_measure(key, name) for name in names]
        for name, measure, differences in zip(
            names, measures, differences_of(measures, study), strict=True
        ):
            versus = {difference.condition.name: difference for difference in differences}
            span = _span(differences)
            cells = [Cell(name)]
            for condition in study.conditions:
                difference, mean = versus.get(condition.name), condition_mean(condition, measure)
                text = _plus_minus(mean, len(condition.runs))
                cells.append(
                    Cell(text, _shade(difference, span), bool(difference and difference.is_clear))
                )
                head = {"subset": name, "condition": condition.name}
                raw.append({**head, **_numbers(mean), **_against(difference)})
            rows.append(cells)
        tables.append(
            DataTable(
                f"subsets-{key}",
                f"Held-out {title} by subset",
                f"{title} of every subset, mean over seeds ± standard error. {_CLEAR} for all "
                "comparisons of this table. On the page, the colour of a mean shows its paired "
                "difference, subset by subset.",
                ["subset", *(condition.name for condition in study.conditions)],
                rows,
                raw,
            )
        )
    return tables


def _subset_measure(key: str, subset: str) -> Measure:
    return lambda run: run.score(key, subset)


def _plus_minus(mean: Mean, seeds: int, plain: bool = False) -> str:
    """``3.1416 ± 0.0010``, with ``(2)`` if only two of the seeds have the figure."""
    if math.isnan(mean.value):
        return "–"
    few = f" ({mean.n})" if mean.n < seeds else ""
    if plain:
        return f"{mean.value:.4g}{few}"
    form = ".4f" if abs(mean.value) < 10 else ".2f"
    if abs(mean.value) >= 1e6:  # a model that diverged
        form = ".3e"
    if math.isnan(mean.error):
        return f"{mean.value:{form}}{few}"
    return f"{mean.value:{form}} ± {mean.error:{form}}{few}"


def _numbers(mean: Mean) -> dict[str, Any]:
    return {"mean": mean.value, "standard_error": mean.error, "n": mean.n}
