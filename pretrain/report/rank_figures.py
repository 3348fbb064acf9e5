"""Pseudo-rank against decay, over training and head by head: the paper's figures 3 and 7."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import cache
from typing import Any

from pretrain.ranks.columns import AnyRow
from pretrain.report.figure_parts import (
    PRODUCTS,
    about,
    ends,
    layers_of,
    mean_over,
    pick,
    sampled,
    shade,
)
from pretrain.report.load import Condition, RunData, Study
from pretrain.report.sample import shown_steps
from pretrain.report.spec import Choice, Control, Figure, Heat, Panel, Series

_ALL = "all layers"
_MOST_STEPS = 100
"""Largest number of steps of the slider, beside the one that print shows: the page contains every
head at each of them."""


BANDS = ("heads", "seeds")
"""What a band can span: heads (each a mean over seeds), or seeds (each a mean over heads)."""
_BAND_WORDS = {
    "heads": "band: least to greatest head",
    "seeds": "band: least to greatest seed",
}
_BAND_CAPTION = (
    "Line: mean over heads and seeds; band: from the least to the greatest head (mean over seeds), "
    "or seed (mean over heads; none with one seed)."
)


def _band_control(band: str) -> Control:
    return Control("band", list(BANDS), default=BANDS.index(band))


def over_decay(study: Study, band: str = "heads") -> Figure:
    """Final pseudo-rank against λ or exposure, layer by layer."""
    layers = layers_of(study)
    axis = Control("axis", ["λ of attention", "exposure Σηλ"])

    def view(choice: Choice) -> list[Panel]:
        by_exposure, spanned = choice[0] == 1, BANDS[choice[1]]
        panels = []
        for product, name in PRODUCTS.items():
            lines = []
            for index, layer in enumerate([*layers, None]):
                points = []
                for condition in study.conditions:
                    ranks = _by(spanned, condition, product, layer)
                    place = condition.exposure if by_exposure else condition.decay
                    points.append((place, mean_over(ranks), *ends(ranks)))
                points.sort()
                x, y, low, high = (list(part) for part in zip(*points, strict=True))
                whole = layer is None
                lines.append(
                    Series(
                        _ALL if whole else f"layer {layer}",
                        x,
                        y,
                        shade(index, len(layers) + 1),
                        None if whole and spanned == "heads" else low,
                        None if whole and spanned == "heads" else high,
                        dash=whole,
                    )
                )
            panels.append(
                Panel(name, axis.options[choice[0]], "pseudo-rank", lines, y_range=(0, 1),
                      log_x=not by_exposure, band=_BAND_WORDS[spanned])
            )  # fmt: skip
        return panels

    return Figure(
        "rank-over-decay",
        "Rank against decay",
        f"Pseudo-rank at the end of training (the paper's figures 3 and 7). {about(study)} "
        f"{_BAND_CAPTION} "
        "Theory: decay acts like a nuclear norm penalty on each product, so rank falls as λ or the "
        "exposure Σηλ grows. λ is the applied λ (Σ rate·λ / Σ rate over the updates), on a "
        "symmetric logarithmic axis; where it differs between layers, it is their mean.",
        [axis, _band_control(band)],
        view,
        "Click a layer in the legend to hide it.",
    )


def _by(spanned: str, condition: Condition, product: str, layer: int | None) -> list[float]:
    """Final pseudo-rank of every head (mean over the seeds), or of every seed (over the heads)."""
    ranks: dict[Any, list[float]] = defaultdict(list)
    for run in condition.runs:
        for row in pick(run.final, product, layer):
            ranks[_key(spanned, run, row)].append(row["pseudo_rank"])
    return [mean_over(values) for values in ranks.values()]


def _key(spanned: str, run: RunData, row: AnyRow) -> Any:
    return run.seed if spanned == "seeds" else (row["layer"], row["head"])


def over_training(study: Study, band: str = "heads") -> Figure:
    """Pseudo-rank over the steps, one line per condition."""
    layers = layers_of(study)
    control = Control("layer", [_ALL, *(f"layer {layer}" for layer in layers)])

    def view(choice: Choice) -> list[Panel]:
        layer = None if choice[0] == 0 else layers[choice[0] - 1]
        spanned = BANDS[choice[1]]
        return [
            Panel(
                name,
                "step",
                "pseudo-rank",
                [
                    _course(spanned, condition, product, layer, shade(index, len(study.conditions)))
                    for index, condition in enumerate(study.conditions)
                ],
                y_range=(0, 1),
                band=_BAND_WORDS[spanned],
            )
            for product, name in PRODUCTS.items()
        ]

    return Figure(
        "rank-over-training",
        "Rank during training",
        f"Pseudo-rank of both products over training. {about(study)} {_BAND_CAPTION}"
        f"{sampled(study)}",
        [control, _band_control(band)],
        view,
        "Choose a layer above.",
    )


def _course(
    spanned: str, condition: Condition, product: str, layer: int | None, colour: float
) -> Series:
    """Mean over heads and seeds at each step, with the heads or the seeds as a band."""
    by_step: dict[int, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in condition.runs:
        for row in pick(run.heads, product, layer):
            by_step[row["step"]][_key(spanned, run, row)].append(row["pseudo_rank"])
    steps = sorted(by_step)
    heads = [[mean_over(values) for values in by_step[step].values()] for step in steps]
    return Series(
        condition.name,
        [float(step) for step in steps],
        [mean_over(values) for values in heads],
        colour,
        [ends(values)[0] for values in heads],
        [ends(values)[1] for values in heads],
    )


def heads(study: Study) -> Figure:
    """Layer x head, with a slider over the steps; print compares the first and last condition."""
    layers = layers_of(study)
    compared, at = _compared([_steps_of(condition) for condition in study.conditions])
    everything = sorted(set[int]().union(*map(_steps_of, study.conditions)))
    steps = sorted({*shown_steps(everything, _MOST_STEPS), at})
    names = [condition.name for condition in study.conditions]
    conditions = Control("condition", names, default=compared[0])
    products = Control("product", list(PRODUCTS.values()))
    slider = Control("step", [str(step) for step in steps], "slider", steps.index(at))

    @cache
    def table(index: int, product: str) -> dict[tuple[int, int, int], float]:
        ranks: dict[tuple[int, int, int], list[float]] = defaultdict(list)
        for run in study.conditions[index].runs:
            for row in pick(run.heads, product, None):
                ranks[row["step"], row["layer"], row["head"]].append(row["pseudo_rank"])
        return {key: mean_over(values) for key, values in ranks.items()}

    def view(choice: Choice) -> list[Panel]:
        product = list(PRODUCTS)[choice[1]]
        values = table(choice[0], product)
        count = 1 + max(head for _, _, head in values)
        step = steps[choice[2]]
        heat = Heat(
            [f"layer {layer}" for layer in layers],
            [f"head {head}" for head in range(count)],
            [
                [values.get((step, layer, head), math.nan) for head in range(count)]
                for layer in layers
            ],
            0.0,
            1.0,
        )
        known = any(key[0] == step for key in values)
        title = f"{PRODUCTS[product]}, {names[choice[0]]}, step {step}"
        title += "" if known else " (not measured)"
        return [Panel(title, "", "", heat=heat)]

    return Figure(
        "rank-by-head",
        "Every head",
        f"Pseudo-rank of every head, mean over seeds. {about(study)}{sampled(study, len(steps))}",
        [conditions, products, slider],
        view,
        "Move the slider to choose a step of training.",
        tuple(
            (condition, product, steps.index(at))
            for condition in compared
            for product in range(len(PRODUCTS))
        ),
    )


def _steps_of(condition: Condition) -> set[int]:
    """The steps at which a run of a condition was measured."""
    return {row["step"] for run in condition.runs for row in run.heads}


def _compared(measured: list[set[int]]) -> tuple[list[int], int]:
    """Which conditions print compares, and at which step, of the steps of each condition.

    The first and the last, at the last step that both have. Without such a step, it is the last
    one of either, and only the conditions that have it.
    """
    ends = sorted({0, len(measured) - 1})
    common = set.intersection(*(measured[index] for index in ends))
    step = max(common or set.union(*(measured[index] for index in ends)))
    return [index for index in ends if step in measured[index]], step
