"""Figure 3 (right): a Vision Transformer; rank over all heads and layers against decay."""

from __future__ import annotations

from pathlib import Path

from pretrain.report.load import RunData
from pretrain.report.paper.checks import Check, conclude
from pretrain.report.paper.fig2 import accuracy
from pretrain.report.paper.runs import (
    PRODUCTS,
    arrow,
    by_decay,
    largest_rise,
    load_runs,
    mean,
    values,
)
from pretrain.runs.outputs import write_csv, write_figure

_NEEDED = 0.95
"""Accuracy on held-out digits that some λ must reach; not required for other images."""


def figure(runs_folder: Path, out: Path) -> None:
    """Draw both panels, write the numbers, print the checks."""
    groups = by_decay(load_runs(runs_folder))
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "decay": decay,
            "exposure": mean([run.exposure for run in runs]),
            "seeds": len(runs),
            "accuracy": mean([accuracy(run) for run in runs]),
            **{f"rank_{p}": mean([_rank(run, p) for run in runs]) for p in PRODUCTS},
        }
        for decay, runs in groups.items()
    ]
    write_csv(out / "fig3-vit.csv", rows)
    _draw(rows, out / "fig3-vit.png")
    checks = []
    for product, word in (("qk", "W_QK"), ("vp", "W_VP")):
        ranks = [float(row[f"rank_{product}"]) for row in rows]
        claim = f"the mean rank of {word} over all heads and layers falls with decay"
        checks.append(Check(claim, largest_rise(ranks), 0.0, arrow(ranks)))
    best = max(float(row["accuracy"]) for row in rows)
    digits = next(iter(groups.values()))[0].config.task.source == "digits"
    claim = f"held-out accuracy of {_NEEDED:g} at some λ"
    words = f"best {best:.3f}; by λ {arrow([float(row['accuracy']) for row in rows])}"
    checks.append(Check(claim, _NEEDED - best, 0.0, words, decides=digits))
    conclude("fig3-vit", checks, out)


def _rank(run: RunData, product: str) -> float:
    return mean(values(run, product, "pseudo_rank"))


def _draw(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (rank, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    x = [row["exposure"] for row in rows]
    for product, label in PRODUCTS.items():
        rank.plot(x, [row[f"rank_{product}"] for row in rows], "o-", label=label)
    rank.set(title="rank, all heads and layers", xlabel="exposure Σηλ of attention", ylim=(0, None))
    rank.legend(frameon=False)
    right.plot(x, [row["accuracy"] for row in rows], "o-", color="black")
    right.set(title="accuracy, held-out", xlabel="exposure Σηλ of attention")
    write_figure(path, figure)
    plt.close(figure)
