"""The cost of using the low rank: perplexity against the rank that is kept.

In models trained with small and large decay, every head's two products are cut to a share of their
singular values: a language model, and associative recall, which only attention can do. (LASER,
Sharma et al. 2023, found that cutting attention after training hurts.)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pretrain.offline.evaluate import evaluate_checkpoint
from pretrain.offline.truncate import RankChoice
from pretrain.report.load import RunData
from pretrain.report.paper.checks import Check, conclude
from pretrain.report.paper.fig2 import accuracy
from pretrain.report.paper.runs import MLP, colours, given_decay, load_runs, mean, values
from pretrain.runs.folder import resolve_checkpoint
from pretrain.runs.outputs import write_csv, write_figure

SHARES = (1.0, 0.75, 0.5, 0.25, 0.125, 0.0625)
_DOCUMENTS = 40
_LEARNED = 0.9
"""Accuracy from which recall counts as learned."""
_TEXT_SHARE, _RECALL_SHARE = 0.0625, 0.25
"""The shares at which models are compared; a small language model hardly uses its attention."""
Rows = list[dict[str, Any]]


def figure(
    runs_folder: Path, out: Path, data: Path | None = None, recall: Path | None = None
) -> None:
    """Score the models of one seed at every share, draw, write, check.

    Args:
        data: tokenised text to use instead of the runs' own.
        recall: runs of Figure 2, for the second panel.
    """
    finished = load_runs(runs_folder)
    lowest = min(given_decay(run, MLP) for run in finished)
    seed = min(run.seed for run in finished)
    runs = [run for run in finished if run.seed == seed and given_decay(run, MLP) == lowest]
    out.mkdir(parents=True, exist_ok=True)
    panels = {"text": _Panel("text", runs, out, data)}
    if recall is not None:
        panels["recall"] = _Panel("recall", load_runs(recall), out, None)
    write_csv(out / "rank-cost.csv", [row for panel in panels.values() for row in panel.rows])
    _draw(list(panels.values()), out / "rank-cost.png")
    checks = [panel.unchanged() for panel in panels.values()]
    checks.append(panels["text"].compared(runs[0], runs[-1], _TEXT_SHARE))
    if "recall" in panels:
        learned = [run for run in panels["recall"].runs if accuracy(run) >= _LEARNED]
        checks.append(panels["recall"].compared(learned[0], learned[-1], _RECALL_SHARE))
    tables = [f"{panel.name}:\n\n{panel.table()}" for panel in panels.values()]
    conclude("rank-cost", checks, out, "\n\n".join(tables))


class _Panel:
    """Perplexities of runs by the share that is kept."""

    def __init__(self, name: str, runs: list[RunData], out: Path, data: Path | None) -> None:
        self.name, self.runs = name, runs
        self._out, self._data = out, data
        self.rows: Rows = [
            {
                "task": name,
                "decay": given_decay(run),
                "exposure": run.exposure,
                "share": "measured" if share is None else share,
                "perplexity": self._perplexity(run, RankChoice(share)),
            }
            for run in runs
            for share in (*SHARES, None)
        ]

    def _perplexity(self, run: RunData, choice: RankChoice | None) -> float:
        scratch = self._out / "rank-cost-scratch.json"
        figures, _, _ = evaluate_checkpoint(
            resolve_checkpoint(str(run.path)),
            [],
            self._data,
            "test",
            _DOCUMENTS,
            32,
            0,
            scratch,
            choice,
        )
        scratch.unlink()
        return math.exp(float(figures["overall"]["loss"]))

    def at(self, run: RunData, share: object) -> float:
        """Perplexity of a run with a share kept."""
        decay = given_decay(run)
        matches = [row for row in self.rows if row["decay"] == decay and row["share"] == share]
        return float(matches[0]["perplexity"])

    def unchanged(self) -> Check:
        """Check that cutting nothing changes nothing."""
        worst = max(abs(self.at(run, 1.0) / self._perplexity(run, None) - 1) for run in self.runs)
        return Check(f"{self.name}: at rank 1 the perplexity is that of the model", worst, 1e-5)

    def compared(self, small: RunData, large: RunData, share: float) -> Check:
        """Check that the model with more decay loses less."""
        losses = [self.at(run, share) / self.at(run, 1.0) - 1 for run in (small, large)]
        words = f"+{100 * losses[0]:.2f} % against +{100 * losses[1]:.2f} %"
        claim = (
            f"{self.name}: at {share:g} of the rank the model of exposure {large.exposure:.2g} "
            f"loses less than that of {small.exposure:.2g}"
        )
        return Check(claim, losses[1] - losses[0], 0.0, words)

    def table(self) -> str:
        """The table as Markdown."""
        shares: list[object] = [*SHARES, "measured"]
        head = "| λ | exposure | measured rank QK / VP | " + " | ".join(map(str, shares)) + " |"
        lines = [head, "|---" * (len(shares) + 3) + "|"]
        for run in self.runs:
            ranks = [mean(values(run, product, "pseudo_rank")) for product in ("qk", "vp")]
            cells = [f"{self.at(run, share):.2f}" for share in shares]
            lines.append(
                f"| {given_decay(run):.3g} | {run.exposure:.2f} | {ranks[0]:.2f} / {ranks[1]:.2f} "
                f"| {' | '.join(cells)} |"
            )
        return "\n".join(lines)


def _draw(panels: list[_Panel], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (5.5 * len(panels), 4)
    figure, plots = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axes, panel in zip(plots[0], panels, strict=False):
        for run, colour in zip(panel.runs, colours(len(panel.runs)), strict=True):
            curve = [panel.at(run, share) for share in SHARES]
            label = f"λ = {given_decay(run):.3g} (exposure {run.exposure:.2g})"
            axes.plot(SHARES, curve, "o-", color=colour, label=label)
        axes.set(title=panel.name, xlabel="share of singular values kept, every head",
                 ylabel="perplexity, held-out")  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)
    write_figure(path, figure)
    plt.close(figure)
