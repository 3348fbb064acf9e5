"""Figures 3 (left) and 7 and Table 1: the language model, attention decay x MLP decay.

The paper shows layers 5, 7 and 9 of 12. For a shallower model, the layers at the same relative
depth are shown. Table 1 is perplexity on held-out text, mean ± standard error over seeds.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pretrain.report.load import RunData
from pretrain.report.paper.checks import Check, conclude
from pretrain.report.paper.runs import (
    MLP,
    PRODUCTS,
    arrow,
    by_decay,
    given_decay,
    largest_rise,
    load_runs,
    mean,
    values,
)
from pretrain.runs.outputs import write_csv, write_figure

_SHOWN = {"fig3": (5,), "fig7": (7, 9)}
_PAPER_LAYERS = 12


def layers_of(figure: str, depth: int) -> list[int]:
    """The layers of a model of ``depth`` at the relative depth of the paper's layers of 12."""
    return sorted({layer * depth // _PAPER_LAYERS for layer in _SHOWN[figure]})


def _first_row(runs: list[RunData]) -> list[RunData]:
    """Runs whose MLP decay is nearest to 0.1, as in the paper's figure."""
    levels = sorted({given_decay(run, MLP) for run in runs}, key=lambda x: abs(x - 0.1))
    return [run for run in runs if given_decay(run, MLP) == levels[0]]


def figure(name: str, runs_folder: Path, out: Path) -> None:
    """Figure 3 or 7: rank against attention decay, for the paper's layers."""
    runs = _first_row(load_runs(runs_folder))
    layers = layers_of(name, runs[0].config.model.num_layers)
    out.mkdir(parents=True, exist_ok=True)
    rows, checks = [], []
    for layer in layers:
        for product, word in (("qk", "W_QK"), ("vp", "W_VP")):
            ranks = []
            for decay, group in by_decay(runs).items():
                each = [mean(values(run, product, "pseudo_rank", layer)) for run in group]
                ranks.append(mean(each))
                rows.append({
                    "layer": layer, "product": product, "decay": decay,
                    "exposure": mean([run.exposure for run in group]), "rank": ranks[-1],
                    "lowest": min(each), "highest": max(each), "seeds": len(each),
                })  # fmt: skip
            claim = f"the rank of {word} in layer {layer} falls with attention decay"
            checks.append(Check(claim, largest_rise(ranks), 0.0, arrow(ranks)))
    write_csv(out / f"{name}.csv", rows)
    _draw(rows, layers, out / f"{name}.png")
    conclude(name, checks, out)


def _draw(rows: list[dict[str, Any]], layers: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(layers), figsize=(5 * len(layers), 3.8), layout="constrained", squeeze=False
    )
    for axes, layer in zip(panels[0], layers, strict=False):
        for product, label in PRODUCTS.items():
            points = [r for r in rows if r["layer"] == layer and r["product"] == product]
            x = [point["exposure"] for point in points]
            axes.plot(x, [point["rank"] for point in points], "o-", label=label)
            low, high = ([point[key] for point in points] for key in ("lowest", "highest"))
            axes.fill_between(x, low, high, alpha=0.2)
        words = [f"{point['exposure']:.2g}\n(λ {point['decay']:.3g})" for point in points]
        axes.set_xticks(x, words, fontsize=8)
        axes.set(title=f"layer {layer}", xlabel="exposure Σηλ of attention", ylabel="rank")
        axes.set_ylim(0, None)
        axes.legend(frameon=False)
    write_figure(path, figure)
    plt.close(figure)


def table(runs_folder: Path, out: Path) -> None:
    """Table 1: held-out perplexity by (λ_SA, λ_MLP)."""
    runs = load_runs(runs_folder)
    out.mkdir(parents=True, exist_ok=True)
    cells: dict[tuple[float, float], list[float]] = {}
    for run in runs:
        score = run.score("perplexity")
        if score is not None:
            cells.setdefault((given_decay(run, MLP), given_decay(run)), []).append(score)
    rows = [
        {"mlp": mlp, "attention": attention, "perplexity": mean(scores), "error": _error(scores),
         "seeds": len(scores)}
        for (mlp, attention), scores in sorted(cells.items())
    ]  # fmt: skip
    write_csv(out / "table1.csv", rows)
    _draw_table(rows, out / "table1.png")
    conclude("table1", table_checks(runs, rows), out, _markdown(rows))


def _error(scores: list[float]) -> float:
    """Standard error of the mean; NaN for one seed."""
    if len(scores) < 2:
        return math.nan
    centre = mean(scores)
    variance = sum((value - centre) ** 2 for value in scores) / (len(scores) - 1)
    return math.sqrt(variance / len(scores))


def table_checks(runs: list[RunData], rows: list[dict[str, Any]]) -> list[Check]:
    """Check the pairing, which must hold, and the paper's two findings, which need not hold
    here."""
    seeds = {run.seed for run in runs}
    paired = sum(
        len({(run.identity or {}).get("data_order") for run in runs if run.seed == seed}) - 1
        for seed in seeds
    )
    results = [Check("the arms of a seed saw the same samples in the same order", paired, 0)]
    decays = sorted({row["attention"] for row in rows})
    levels = sorted({row["mlp"] for row in rows})
    if len(levels) > 1:
        usual = decays[0]
        first, last = (_cell(rows, level, usual) for level in (levels[0], levels[-1]))
        claim = (
            f"more MLP decay than {levels[0]:g} helps (here {levels[-1]:g}, attention {usual:g})"
        )
        results.append(Check(claim, last - first, 0.0, f"{first:.2f} → {last:.2f}", decides=False))
    across = [_cell(rows, levels[0], decay) for decay in decays]
    best = min(range(len(decays)), key=lambda index: across[index])
    inner = 0.0 if 0 < best < len(decays) - 1 else 1.0
    claim = "attention decay has a sweet spot: some helps, more hurts"
    words = f"{arrow(across, 2)}; best λ {decays[best]:.3g}"
    results.append(Check(claim, inner, 0.0, words, decides=False))
    return results


def _cell(rows: list[dict[str, Any]], mlp: float, attention: float) -> float:
    return next(
        (r["perplexity"] for r in rows if r["mlp"] == mlp and r["attention"] == attention), math.nan
    )


def _markdown(rows: list[dict[str, Any]]) -> str:
    decays = sorted({row["attention"] for row in rows})
    lines = [
        "| λ_MLP \\ λ_SA | " + " | ".join(f"{decay:.3g}" for decay in decays) + " |",
        "|---" * (len(decays) + 1) + "|",
    ]
    for mlp in sorted({row["mlp"] for row in rows}):
        cells = []
        for decay in decays:
            matches = [r for r in rows if r["mlp"] == mlp and r["attention"] == decay]
            cells.append(
                f"{matches[0]['perplexity']:.2f} ± {matches[0]['error']:.2f}" if matches else "–"
            )
        lines.append(f"| {mlp:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _draw_table(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    for mlp in sorted({row["mlp"] for row in rows}):
        points = [row for row in rows if row["mlp"] == mlp]
        places = range(len(points))
        axes.errorbar(places, [p["perplexity"] for p in points], [p["error"] for p in points],
                      fmt="o-", capsize=3, label=f"λ_MLP = {mlp:g}")  # fmt: skip
        axes.set_xticks(list(places), [f"{p['attention']:.3g}" for p in points])
    axes.set(xlabel="λ of attention", ylabel="perplexity, held-out text")
    axes.legend(frameon=False)
    write_figure(path, figure)
    plt.close(figure)
