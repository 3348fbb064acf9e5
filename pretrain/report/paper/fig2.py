"""Figure 2: associative recall in a two-layer attention-only transformer.

The rank of the first layer's products falls with decay, and ‖AᵀA − BᵀB‖ decays faster with larger
λ: to first order as exp(−2Σηλ), also under AdamW with noise, down to a floor (Prop. B.2).
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

from pretrain.report.load import RunData
from pretrain.report.paper.checks import Check, conclude
from pretrain.report.paper.runs import (
    PRODUCTS,
    arrow,
    colours,
    given_decay,
    largest_rise,
    load_runs,
    long_rows,
    mean,
    series,
    values,
)
from pretrain.runs.outputs import write_csv, write_figure

_PAPER = 0.15
"""λ up to which recall must be learned: the paper's usual decay is 0.1."""


def fall_rate(run: RunData, product: str, layer: int = 0) -> float:
    """Fitted rate per step at which log ‖AᵀA − BᵀB‖ falls, over its first 1/e (least squares)."""
    steps, sizes = series(run, product, "discrepancy", layer)
    floor = sizes[0] / math.e
    stop = next((i for i, value in enumerate(sizes) if value < floor), len(sizes) - 1)
    x = steps[: stop + 1]
    y = [math.log(value / sizes[0]) for value in sizes[: stop + 1]]
    return -sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)


def figure(runs_folder: Path, out: Path) -> None:
    """Draw the panels, write the numbers, print the checks."""
    runs = load_runs(runs_folder)
    out.mkdir(parents=True, exist_ok=True)
    columns = ("pseudo_rank", "discrepancy", "nuclear_norm", "frobenius_bound", "balance")
    write_csv(out / "fig2.csv", long_rows(runs, columns))
    _draw(runs, out / "fig2.png")
    conclude("fig2", checks(runs), out, _table(runs))


def accuracy(run: RunData) -> float:
    """Share of correct answers on held-out samples."""
    return float((run.evaluation or {})["overall"]["accuracy"])


def checks(runs: list[RunData]) -> list[Check]:
    """The predictions of the figure, with numbers."""
    chance = 1 / runs[0].config.task.pairs
    usual = [run for run in runs if given_decay(run) <= _PAPER]
    worst = min(accuracy(run) for run in usual)
    results = [
        Check(
            f"recall is learned at λ up to {_PAPER:g} (chance {chance:.2f})",
            1 - worst,
            0.1,
            f"accuracy {worst:.3f}",
        )
    ]
    for product, name in (("vp", "W_VP"), ("qk", "W_QK")):
        ranks = [mean(values(run, product, "pseudo_rank", 0)) for run in runs]
        claim = f"the rank of the first layer's {name} falls with decay"
        results.append(Check(claim, largest_rise(ranks), 0.0, arrow(ranks)))
        rates = [fall_rate(run, product) for run in runs]
        least = min(later - earlier for earlier, later in pairwise(rates))
        claim = f"‖AᵀA − BᵀB‖ of {name} falls faster with larger λ"
        words = "per 1,000 steps " + arrow([1000 * rate for rate in rates], 2)
        results.append(Check(claim, -least, 0.0, words))
        size = series(runs[0], product, "discrepancy", 0)[1]
        share_left = size[-1] / size[0]
        claim = f"without decay it does not vanish ({name})"
        results.append(
            Check(claim, 1 - share_left, 0.5, f"{share_left:.2f} of its initial size is left")
        )
    return results


def _table(runs: list[RunData]) -> str:
    head = (
        "| λ | exposure | accuracy | rank W_QK | rank W_VP | rate of fall, fitted / 2ηλ (QK, VP) |"
    )
    lines = [head, "|---|---|---|---|---|---|"]
    for run in runs:
        decay = given_decay(run)
        law = 2 * run.config.optimizer.learning_rate * decay
        ratios = [
            f"{fall_rate(run, product) / law:.2f}" if decay else "–" for product in ("qk", "vp")
        ]
        ranks = [mean(values(run, product, "pseudo_rank", 0)) for product in ("qk", "vp")]
        lines.append(
            f"| {decay:.3g} | {run.exposure:.2f} | {accuracy(run):.3f} | {ranks[0]:.3f} | "
            f"{ranks[1]:.3f} | {', '.join(ratios)} |"
        )
    return "\n".join(lines)


def _draw(runs: list[RunData], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 4, figsize=(15, 6.4), layout="constrained")
    for row, product in enumerate(("vp", "qk")):
        rank, discrepancy, gap, extra = panels[row]
        for run, colour in zip(runs, colours(len(runs)), strict=True):
            style = {"color": colour, "label": f"λ = {given_decay(run):.3g}"}
            rank.plot(*series(run, product, "pseudo_rank", 0), **style)
            discrepancy.semilogy(*series(run, product, "discrepancy", 0), **style)
            steps, bound = series(run, product, "frobenius_bound", 0)
            nuclear = series(run, product, "nuclear_norm", 0)[1]
            gap.semilogy(steps, [b - n for b, n in zip(bound, nuclear, strict=True)], **style)
            if row == 0:
                points = [(row["step"], row["accuracy"]) for row in run.held_out]
                extra.plot(*zip(*points, strict=True), **style)
        name = PRODUCTS[product]
        rank.set(title=f"rank of {name}, layer 0", xlabel="step")
        discrepancy.set(title=f"‖AᵀA − BᵀB‖ of {name}", xlabel="step")
        gap.set(title=f"½(‖A‖² + ‖B‖²) − ‖{name}‖$_*$", xlabel="step")
    panels[0][0].legend(fontsize=8, frameon=False)
    panels[0][3].set(title="accuracy, held-out", xlabel="step")
    last = panels[1][3]
    for product, marker in (("qk", "o"), ("vp", "s")):
        ranks = [mean(values(run, product, "pseudo_rank", 0)) for run in runs]
        last.plot([run.exposure for run in runs], ranks, f"{marker}-", label=PRODUCTS[product])
    last.set(title="rank at the end", xlabel="exposure Σηλ", ylim=(0, None))
    last.legend(frameon=False)
    write_figure(path, figure)
    plt.close(figure)
