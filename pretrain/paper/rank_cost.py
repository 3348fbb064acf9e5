"""What would it cost to use the low rank? Perplexity against the share of singular values kept.

Every head's W_QK and W_VP is cut to its leading directions after training (`pretrain.truncate`);
a model trained with more decay of attention should lose less, as it has less to lose. (LASER,
Sharma et al. 2023, found that cutting attention after usual training hurts.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.paper.checks import Check, conclude, write_csv
from pretrain.paper.runs import MLP, colours, given_decay, load_runs, mean, values
from pretrain.report.load import RunData
from pretrain.standalone import evaluate_checkpoint
from pretrain.truncate import RankChoice

SHARES = (1.0, 0.75, 0.5, 0.25, 0.125, 0.0625)
_DOCUMENTS = 40
Rows = list[dict[str, Any]]


def figure(runs_folder: Path, out: Path, data: Path | None = None) -> None:
    """Score the models of one seed at every share, draw, write, check."""
    runs = load_runs(runs_folder)
    lowest = min(given_decay(run, MLP) for run in runs)
    seed = min(run.seed for run in runs)
    runs = [run for run in runs if run.seed == seed and given_decay(run, MLP) == lowest]
    out.mkdir(parents=True, exist_ok=True)
    rows: Rows = [
        {
            "decay": given_decay(run),
            "exposure": run.exposure,
            "share": "measured" if share is None else share,
            "perplexity": _perplexity(run, share, out, data),
        }
        for run in runs
        for share in (*SHARES, None)
    ]
    write_csv(out / "rank-cost.csv", rows)
    _draw(rows, out / "rank-cost.png")
    whole = [_perplexity(run, 0.0, out, data) for run in runs]
    conclude("rank-cost", _checks(runs, rows, whole), out, _table(runs, rows))


def _perplexity(run: RunData, share: float | None, out: Path, data: Path | None) -> float:
    """Perplexity with a share kept (None: the measured rank, 0: not cut at all)."""
    choice = None if share == 0.0 else RankChoice(share)
    scratch = out / "rank-cost-scratch.json"
    figures, _, _ = evaluate_checkpoint(
        str(run.path), [], data, "test", _DOCUMENTS, 32, 0, scratch, choice
    )
    scratch.unlink()
    return float(figures["overall"]["perplexity"])


def _at(rows: Rows, run: RunData, share: object) -> float:
    found = [r for r in rows if r["decay"] == given_decay(run) and r["share"] == share]
    return float(found[0]["perplexity"])


def _loss_at(rows: Rows, run: RunData, share: object) -> float:
    return _at(rows, run, share) / _at(rows, run, 1.0) - 1


def _checks(runs: list[RunData], rows: Rows, whole: list[float]) -> list[Check]:
    same = max(abs(_at(rows, run, 1.0) / one - 1) for run, one in zip(runs, whole))
    small, large = (_loss_at(rows, run, 0.25) for run in (runs[0], runs[-1]))
    words = f"+{100 * small:.1f} % against +{100 * large:.1f} %"
    return [
        Check("at rank 1 the perplexity is that of the model", same, 1e-5),
        Check("at a quarter of the rank the model of most decay loses less than that of none",
              large - small, 0.0, words),
    ]  # fmt: skip


def _table(runs: list[RunData], rows: Rows) -> str:
    shares: list[object] = [*SHARES, "measured"]
    head = "| λ | exposure | measured rank QK / VP | " + " | ".join(map(str, shares)) + " |"
    lines = [head, "|---" * (len(shares) + 3) + "|"]
    for run in runs:
        ranks = [f"{mean(values(run, product, 'pseudo_rank')):.2f}" for product in ("qk", "vp")]
        cells = [f"{_at(rows, run, share):.2f}" for share in shares]
        lines.append(
            f"| {given_decay(run):.3g} | {run.exposure:.2f} | {' / '.join(ranks)} | "
            + " | ".join(cells) + " |"
        )  # fmt: skip
    return "\n".join(lines)


def _draw(rows: Rows, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    decays = sorted({float(row["decay"]) for row in rows})
    for decay, colour in zip(decays, colours(len(decays))):
        points = [r for r in rows if r["decay"] == decay and r["share"] != "measured"]
        axes.plot(
            [r["share"] for r in points], [r["perplexity"] for r in points], "o-", color=colour,
            label=f"λ = {decay:.3g} (exposure {float(points[0]['exposure']):.2g})",
        )  # fmt: skip
    axes.set(xlabel="share of singular values kept, every head", ylabel="perplexity, held-out text")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
