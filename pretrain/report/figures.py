"""The figures of a report, from a study: the paper's figures 2, 3, 4 and 7, and the training."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from typing import TypeVar

from pretrain.probe import Row
from pretrain.report.load import Condition, RunData, Study
from pretrain.report.spec import Choice, Control, Figure, Heat, Panel, Series

PRODUCTS = {"qk": "W_QK", "vp": "W_VP"}
_ALL = "all layers"
_T = TypeVar("_T")


def figures_of(study: Study) -> list[Figure]:
    """Every figure that the study's runs have data for."""
    found = [
        over_decay(study),
        over_training(study),
        heads(study),
        discrepancy(study),
        bounds(study),
        *row_norms_if_any(study),
        *spectra_if_any(study),
        losses(study),
        settings(study),
    ]
    return found


def shade(index: int, count: int) -> float:
    """A place on the colour scale for the index-th of an ordered few."""
    return 0.9 * index / max(1, count - 1)


def layers_of(study: Study) -> list[int]:
    """Layers that every run has."""
    return sorted({row["layer"] for row in study.runs[0].final})


def _pick(rows: Iterable[Row], product: str, layer: int | None) -> list[Row]:
    return [
        row
        for row in rows
        if row["product"] == product and (layer is None or row["layer"] == layer)
    ]


def _mean(values: list[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _sample(study: Study) -> str:
    """What was measured, for captions."""
    config, runs = study.runs[0].config, study.runs
    seeds = sorted({run.seed for run in runs})
    model = config.model
    tokens = config.train.steps * config.train.global_batch * model.context
    return (
        f"{len(runs)} runs, {len(study.conditions)} conditions, n = {len(seeds)} seed"
        f"{'s' * (len(seeds) > 1)}; {model.dialect.value} of {model.num_layers} layers x "
        f"{model.num_attention_heads} heads, width {model.hidden_size}, {tokens:,} tokens a run."
    )


# --- Figures 3 and 7: rank against decay, and over training -------------------------------------


def over_decay(study: Study) -> Figure:
    """Pseudo-rank at the end against λ or exposure, layer by layer."""
    layers = layers_of(study)
    axis = Control("axis", ["λ of attention", "exposure Σηλ"])

    def view(choice: Choice) -> list[Panel]:
        by_exposure = choice[0] == 1
        panels = []
        for product, name in PRODUCTS.items():
            lines = []
            for index, layer in enumerate([*layers, None]):
                points = []
                for condition in study.conditions:
                    ranks = _by_head(condition, product, layer)
                    place = condition.exposure if by_exposure else condition.decay
                    points.append((place, _mean(ranks), min(ranks), max(ranks)))
                points.sort()
                x, y, low, high = (list(part) for part in zip(*points, strict=True))
                whole = layer is None
                lines.append(
                    Series(
                        _ALL if whole else f"layer {layer}",
                        x,
                        y,
                        shade(index, len(layers) + 1),
                        None if whole else low,
                        None if whole else high,
                        dash=whole,
                    )
                )
            panels.append(
                Panel(name, axis.options[choice[0]], "pseudo-rank", lines, y_range=(0, 1),
                      log_x=not by_exposure)
            )  # fmt: skip
        return panels

    return Figure(
        "rank-over-decay",
        "Rank against decay",
        f"Pseudo-rank at the end of training (the paper's figures 3 and 7). {_sample(study)} Line: "
        "mean over heads and seeds; band: from the least to the greatest head (mean over seeds). "
        "Theory: decay acts as a nuclear norm on each product, so rank falls as λ, or the exposure "
        "Σηλ, grows. λ is on a symmetric logarithmic axis. Click a layer in the legend to hide it.",
        [axis],
        view,
    )


def _by_head(condition: Condition, product: str, layer: int | None) -> list[float]:
    """Final pseudo-rank of every head, mean over the seeds."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for run in condition.runs:
        for row in _pick(run.final, product, layer):
            found[row["layer"], row["head"]].append(row["pseudo_rank"])
    return [_mean(values) for values in found.values()]


def over_training(study: Study) -> Figure:
    """Pseudo-rank over the steps, one line a condition."""
    layers = layers_of(study)
    control = Control("layer", [_ALL, *(f"layer {layer}" for layer in layers)])

    def view(choice: Choice) -> list[Panel]:
        layer = None if choice[0] == 0 else layers[choice[0] - 1]
        return [
            Panel(
                name,
                "step",
                "pseudo-rank",
                [
                    _course(condition, product, layer, shade(index, len(study.conditions)))
                    for index, condition in enumerate(study.conditions)
                ],
                y_range=(0, 1),
            )
            for product, name in PRODUCTS.items()
        ]

    return Figure(
        "rank-over-training",
        "Rank while training",
        f"Pseudo-rank of both products over training. {_sample(study)} Line: mean over heads and "
        "seeds; band: from the least to the greatest head (mean over seeds). Choose a layer above.",
        [control],
        view,
    )


def _course(condition: Condition, product: str, layer: int | None, colour: float) -> Series:
    """Mean over heads and seeds at each step, with the heads as a band."""
    found: dict[int, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in condition.runs:
        for row in _pick(run.heads, product, layer):
            found[row["step"]][row["layer"], row["head"]].append(row["pseudo_rank"])
    steps = sorted(found)
    heads = [[_mean(values) for values in found[step].values()] for step in steps]
    return Series(
        condition.name,
        [float(step) for step in steps],
        [_mean(values) for values in heads],
        colour,
        [min(values) for values in heads],
        [max(values) for values in heads],
    )


def heads(study: Study) -> Figure:
    """Layer x head, with a slider over the steps."""
    layers = layers_of(study)
    steps = sorted({row["step"] for row in study.runs[0].heads})
    conditions = Control("condition", [condition.name for condition in study.conditions])
    products = Control("product", list(PRODUCTS.values()))
    slider = Control("step", [str(step) for step in steps], "slider", len(steps) - 1)

    @cache
    def table(index: int, product: str) -> dict[tuple[int, int, int], float]:
        found: dict[tuple[int, int, int], list[float]] = defaultdict(list)
        for run in study.conditions[index].runs:
            for row in _pick(run.heads, product, None):
                found[row["step"], row["layer"], row["head"]].append(row["pseudo_rank"])
        return {key: _mean(values) for key, values in found.items()}

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
        title = f"{PRODUCTS[product]}, {study.conditions[choice[0]].name}, step {step}"
        return [Panel(title, "", "", heat=heat)]

    return Figure(
        "rank-by-head",
        "Every head",
        f"Pseudo-rank of every head, mean over seeds. {_sample(study)} Move the slider through the "
        "steps of training.",
        [conditions, products, slider],
        view,
    )


# --- Figures 2 and 4: discrepancy, bound ---------------------------------------------------------


def _law(run: RunData, product: str) -> tuple[str, str, str]:
    """(level, column, words) of the quantity that the theory's law is about in this model."""
    if product == "qk" and run.config.model.rotary_dim:
        return _level(run), "rope_pair_discrepancy", "of rotary pairs √Σ(‖A_p‖² − ‖B_p‖²)²"
    return _level(run), "discrepancy", "‖AᵀA − BᵀB‖"


def _level(run: RunData) -> str:
    return "group" if any(row["level"] == "group" for row in run.ranks) else "head"


def discrepancy(study: Study) -> Figure:
    """Discrepancy relative to its start, with what decay alone would leave of it."""
    first = study.runs[0]
    words = {product: _law(first, product)[2] for product in PRODUCTS}

    def view(choice: Choice) -> list[Panel]:
        panels = []
        for product, name in PRODUCTS.items():
            lines = []
            for index, condition in enumerate(study.conditions):
                colour = shade(index, len(study.conditions))
                found, left = _fall(condition, product)
                steps = sorted(found)
                if not steps:
                    continue
                x = [float(step) for step in steps]
                lines.append(Series(condition.name, x, [found[s] for s in steps], colour))
                lines.append(
                    Series(f"{condition.name}: ∏(1−ηλ)²", x, [left[s] for s in steps], colour,
                           dash=True)
                )  # fmt: skip
            title = f"{name}: {words[product]}"
            panels.append(Panel(title, "step", "share of its start", lines, log_y=True))
        return panels

    return Figure(
        "discrepancy",
        "Balance of the factors",
        "Discrepancy between the two factors of each product, relative to its first measurement, "
        f"mean over heads and seeds (the paper's figure 2). {_sample(study)} Dashed: ∏(1 − ηλ)² "
        "with the learning rate and λ that were used, which is the law under gradient flow "
        "(Lemma B.1). AdamW's steps put discrepancy back: a floor, higher the smaller λ, is "
        "expected. Rotary positions and grouped-query attention: the law holds per frequency pair "
        "and per group, which is what is shown then.",
        [],
        view,
    )


def _fall(condition: Condition, product: str) -> tuple[dict[int, float], dict[int, float]]:
    found: dict[int, list[float]] = defaultdict(list)
    left: dict[int, list[float]] = defaultdict(list)
    for run in condition.runs:
        level, column, _ = _law(run, product)
        rows = [row for row in run.ranks if row["product"] == product and row["level"] == level]
        begin = min(row["step"] for row in rows)
        start = {(r["layer"], r["head"]): r for r in rows if r["step"] == begin}
        for row in rows:
            before = start[row["layer"], row["head"]]
            if before[column] > 0:
                found[row["step"]].append(row[column] / before[column])
                kept = row["retention_a"] * row["retention_b"]
                left[row["step"]].append(kept / (before["retention_a"] * before["retention_b"]))
    return (
        {step: _mean(values) for step, values in found.items()},
        {step: _mean(values) for step, values in left.items()},
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
            panels.append(
                Panel(name, "½(‖A‖² + ‖B‖²)", "nuclear norm", lines, log_x=True, log_y=True,
                      diagonal=True)
            )  # fmt: skip
        return panels

    return Figure(
        "bound",
        "Nuclear norm against its bound",
        "Every head at the end of training (the paper's figure 4): the nuclear norm of the product "
        f"against ½(‖A‖² + ‖B‖²). {_sample(study)} Theory: never above the diagonal, and on it "
        "where the factors balance, as decay makes them. Not shown for the QK product under "
        "QK-norm, whose logits do not depend on the factors' sizes.",
        [],
        view,
    )


def row_norms_if_any(study: Study) -> list[Figure]:
    """Row norms of W_Q against W_K, and of W_V against P, where checkpoints are at hand."""
    from pretrain.report.weights import row_norms

    chosen = [condition.runs[0] for condition in study.conditions]
    norms = [row_norms(run) for run in chosen]
    if any(one is None for one in norms):
        return []

    def view(choice: Choice) -> list[Panel]:
        panels = []
        for pair, (x, y) in {"qk": ("‖W_K row‖²", "‖W_Q row‖²"),
                             "vp": ("‖P column‖²", "‖W_V row‖²")}.items():  # fmt: skip
            lines = []
            for index, (condition, found) in enumerate(zip(study.conditions, norms, strict=True)):
                assert found is not None
                a, b, texts = found[pair]
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
            f"seed (the paper's figure 4). {_sample(study)} Theory: on the diagonal where "
            "AᵀA = BᵀB. Grouped-query attention: the rows of a group's queries are summed.",
            [],
            view,
        )
    ]


# --- spectra --------------------------------------------------------------------------------------

_MOST_HEADS, _MOST_STEPS = 24, 8


def spectra_if_any(study: Study) -> list[Figure]:
    """Singular values of a chosen head at some steps, where they were stored."""
    if any("singular_values" not in run.heads[0] for run in study.runs):
        return []
    places = sorted({(row["layer"], row["head"]) for row in study.runs[0].final})
    places = _some(places, _MOST_HEADS)
    steps = _some(sorted({row["step"] for row in study.runs[0].heads}), _MOST_STEPS)
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
                    y = [max(value, 1e-12) for value in sigma]
                    lines.append(Series(f"step {step}", x, y, shade(index, len(steps))))
            panels.append(Panel(name, "index", "singular value", lines, log_y=True))
        return panels

    return [
        Figure(
            "spectra",
            "Spectrum of a head",
            "Singular values of both products of one head at some steps of training, from the "
            f"condition's first seed. {_sample(study)} Theory: decay subtracts from every singular "
            "value, and those that the loss does not hold up vanish.",
            [conditions, control],
            view,
        )
    ]


def _some(values: list[_T], most: int) -> list[_T]:
    """At most so many, evenly chosen, first and last among them."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


# --- training -------------------------------------------------------------------------------------


def losses(study: Study) -> Figure:
    """Training and held-out loss."""

    def view(choice: Choice) -> list[Panel]:
        count = len(study.conditions)
        training, held = [], []
        for index, condition in enumerate(study.conditions):
            x, y = _averaged(condition, lambda run: [(r["step"], r["loss"]) for r in run.metrics])
            training.append(Series(condition.name, x, _smooth(y), shade(index, count)))
            x, y = _averaged(condition, lambda run: [(r["step"], r["loss"]) for r in run.held_out])
            held.append(Series(condition.name, x, y, shade(index, count)))
        return [
            Panel("training, running mean", "step", "loss, nats per token", training),
            Panel("held out, fixed sample", "step", "loss, nats per token", held),
        ]

    return Figure(
        "loss",
        "Loss",
        f"Training loss (mean over seeds, running mean over a thirtieth of the run) and loss on a "
        f"fixed sample of held-out documents. {_sample(study)}",
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
    return [float(step) for step in steps], [_mean(found[step]) for step in steps]


def _smooth(values: list[float]) -> list[float]:
    width = max(1, len(values) // 30)
    return [_mean(values[max(0, i - width) : i + 1]) for i in range(len(values))]


def settings(study: Study) -> Figure:
    """Learning rate, λ, gradient norm and speed."""

    def used(run: RunData) -> list[tuple[int, float]]:
        rows: dict[int, list[float]] = defaultdict(list)
        for row in run.heads:
            rows[row["step"]].append((row["decay_a"] + row["decay_b"]) / 2)
        return [(step, _mean(values)) for step, values in sorted(rows.items())]

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
                lines.append(Series(condition.name, x, y, shade(index, len(study.conditions))))
            panels.append(Panel(title, "step", title, lines))
        return panels

    return Figure(
        "settings",
        "What the optimizer did",
        "Learning rate, λ of attention (mean over layers and roles), gradient norm before clipping "
        f"and speed; means over seeds. {_sample(study)}",
        [],
        view,
    )
