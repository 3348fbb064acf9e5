"""Figures of the theory: discrepancy, bound, row norms (the paper's figures 2 and 4), spectra."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import cache

from pretrain.report.figure_parts import (
    PRODUCTS,
    about,
    mean_over,
    sampled,
    shade,
)
from pretrain.report.load import Condition, RunData, Study
from pretrain.report.sample import some_of
from pretrain.report.spec import Choice, Control, Figure, Panel, Series


def _why_empty(study: Study, product: str) -> str:
    """Why a panel has no values: the law does not apply with QK-norm, or weights are not finite."""
    if product == "qk" and all(run.config.model.qk_norm for run in study.runs):
        return "does not apply (QK-norm)"
    return "no finite values"


def _law(run: RunData, product: str) -> tuple[str, str, str]:
    """(level, column, title) of the quantity to which the balance law applies in this model."""
    if product == "qk" and run.config.model.rotary_dim:
        return _level(run), "rope_pair_discrepancy", "of rotary pairs √Σ(‖A_p‖² − ‖B_p‖²)²"
    return _level(run), "discrepancy", "‖AᵀA − BᵀB‖"


def _level(run: RunData) -> str:
    return "group" if any(row["level"] == "group" for row in run.ranks) else "head"


def discrepancy(study: Study) -> Figure:
    """Discrepancy relative to its start, beside what decay alone would leave of it."""
    first = study.runs[0]
    words = {product: _law(first, product)[2] for product in PRODUCTS}

    def view(choice: Choice) -> list[Panel]:
        panels = []
        for product, name in PRODUCTS.items():
            lines = []
            for index, condition in enumerate(study.conditions):
                colour = shade(index, len(study.conditions))
                shares, predicted = _fall(condition, product)
                steps = sorted(shares)
                if not steps:
                    continue
                x = [float(step) for step in steps]
                lines.append(Series(condition.name, x, [shares[s] for s in steps], colour))
                lines.append(
                    Series(f"{condition.name}: ∏(1−ηλ)²", x, [predicted[s] for s in steps], colour,
                           dash=True)
                )  # fmt: skip
            title = (
                f"{name}: {words[product]}" if lines else f"{name}: {_why_empty(study, product)}"
            )
            panels.append(Panel(title, "step", "share of its start", lines, log_y=True))
        return panels

    return Figure(
        "discrepancy",
        "Discrepancy of the factors",
        "Discrepancy between the two factors of each product, relative to its first measurement, "
        f"mean over heads and seeds (the paper's figure 2). {about(study)} Dotted: ∏(1 − ηλ)² "
        "with the learning rate and λ that were used, which is the law under gradient flow "
        "(Lemma B.1). AdamW's steps add discrepancy again, so a floor is expected, which is higher "
        "for smaller λ. With rotary positions and grouped-query attention, the law holds per "
        f"frequency pair and per group, and these are shown.{sampled(study)}",
        [],
        view,
    )


def _fall(condition: Condition, product: str) -> tuple[dict[int, float], dict[int, float]]:
    shares: dict[int, list[float]] = defaultdict(list)
    predicted: dict[int, list[float]] = defaultdict(list)
    for run in condition.runs:
        level, column, _ = _law(run, product)
        rows = [row for row in run.ranks if row["product"] == product and row["level"] == level]
        begin = min(row["step"] for row in rows)
        start = {(r["layer"], r["head"]): r for r in rows if r["step"] == begin}
        for row in rows:
            before = start[row["layer"], row["head"]]
            if before[column] > 0:
                shares[row["step"]].append(row[column] / before[column])
                retention = row["retention_a"] * row["retention_b"]
                predicted[row["step"]].append(
                    retention / (before["retention_a"] * before["retention_b"])
                )
    return (
        {step: mean_over(values) for step, values in shares.items()},
        {step: mean_over(values) for step, values in predicted.items()},
    )


def bounds(study: Study) -> Figure:
    """Nuclear norm against ½(‖A‖² + ‖B‖²) for every head."""

    def view(choice: Choice) -> list[Panel]:
        panels = []
        for product, name in PRODUCTS.items():
            lines = []
            for index, condition in enumerate(study.conditions):
                level = _level(condition.runs[0])
                rows = [
                    (run, row)
                    for run in condition.runs
                    for row in run.ranks
                    if (row["product"], row["level"]) == (product, level)
                    and row["step"] == run.final[0]["step"]
                    and not math.isnan(row["frobenius_bound"])
                ]
                texts = [
                    f"layer {row['layer']} {level} {row['head']} seed {run.seed}"
                    for run, row in rows
                ]
                lines.append(
                    Series(
                        condition.name,
                        [row["frobenius_bound"] for _, row in rows],
                        [row["nuclear_norm"] for _, row in rows],
                        shade(index, len(study.conditions)),
                        points=True,
                        texts=texts,
                    )
                )
            title = (
                name if any(line.x for line in lines) else f"{name}: {_why_empty(study, product)}"
            )
            panels.append(
                Panel(title, "½(‖A‖² + ‖B‖²)", "nuclear norm", lines, log_x=True, log_y=True,
                      diagonal=True)
            )  # fmt: skip
        return panels

    return Figure(
        "bound",
        "Nuclear norm against its bound",
        "Every head at the end of training (the paper's figure 4): the nuclear norm of the product "
        f"against ½(‖A‖² + ‖B‖²). {about(study)} Theory: points are never above the diagonal, "
        "and on it if the factors balance, which decay causes. The QK product is not shown with "
        "QK-norm, because the logits do not depend on the factors' sizes.",
        [],
        view,
    )


def row_norms_if_any(study: Study) -> list[Figure]:
    """Row norms of W_Q against W_K, and of W_V against P, if there are checkpoints."""
    from pretrain.report.weights import row_norms

    chosen = [condition.runs[0] for condition in study.conditions]
    norms = [row_norms(run) for run in chosen]
    if any(run_norms is None for run_norms in norms):
        return []

    def view(choice: Choice) -> list[Panel]:
        panels = []
        for pair, (x, y) in {"qk": ("‖W_K row‖²", "‖W_Q row‖²"),
                             "vp": ("‖P column‖²", "‖W_V row‖²")}.items():  # fmt: skip
            lines = []
            for index, (condition, run_norms) in enumerate(
                zip(study.conditions, norms, strict=True)
            ):
                assert run_norms is not None
                a, b, texts = run_norms[pair]
                colour = shade(index, len(norms))
                lines.append(Series(condition.name, a, b, colour, points=True, texts=texts))
            panels.append(Panel(PRODUCTS[pair], x, y, lines, log_x=True, log_y=True, diagonal=True))
        return panels

    return [
        Figure(
            "row-norms",
            "Row norms of the two factors",
            "Squared norm of each row of W_Q (W_V) of the first head of each layer against that of "
            "the same row of W_K (column of P), from the last checkpoint of each condition's first "
            f"seed (the paper's figure 4). {about(study)} Theory: points are on the "
            "diagonal if AᵀA = BᵀB. With grouped-query attention, the rows of a group's queries "
            "are summed.",
            [],
            view,
        )
    ]


_MOST_HEADS, _MOST_STEPS = 24, 8


def spectra_if_any(study: Study) -> list[Figure]:
    """Singular values of a chosen head at some steps, if they were stored."""
    if any("singular_values" not in run.heads[0] for run in study.runs):
        return []
    places = sorted({(row["layer"], row["head"]) for row in study.runs[0].final})
    places = some_of(places, _MOST_HEADS)
    steps = some_of(sorted({row["step"] for row in study.runs[0].heads}), _MOST_STEPS)
    shown = set(steps)
    conditions = Control(
        "condition",
        [condition.name for condition in study.conditions],
        default=len(study.conditions) - 1,
    )
    control = Control("head", [f"layer {layer} head {head}" for layer, head in places])

    @cache
    def table(index: int) -> dict[tuple[int, int, int, str], list[float]]:
        run = study.conditions[index].runs[0]
        return {
            (row["step"], row["layer"], row["head"], row["product"]): row["singular_values"]
            for row in run.heads
            if row["step"] in shown
        }

    def view(choice: Choice) -> list[Panel]:
        values, (layer, head) = table(choice[0]), places[choice[1]]
        panels = []
        for product, name in PRODUCTS.items():
            lines = []
            for index, step in enumerate(steps):
                sigma = values.get((step, layer, head, product))
                if sigma:
                    x = [float(number) for number in range(1, len(sigma) + 1)]
                    y = [value if value > 0 else math.nan for value in sigma]
                    lines.append(Series(f"step {step}", x, y, shade(index, len(steps))))
            panels.append(Panel(name, "index", "singular value", lines, log_y=True))
        return panels

    return [
        Figure(
            "spectra",
            "Spectrum of a head",
            "Singular values of both products of one head at some steps of training, from the "
            f"condition's first seed. {about(study)} Theory: decay subtracts from every singular "
            "value, and those that the loss does not maintain vanish.",
            [conditions, control],
            view,
        )
    ]
