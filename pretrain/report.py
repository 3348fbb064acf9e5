"""One self-contained page of plots and tables, from run folders alone."""

from __future__ import annotations

import base64
import html
import io
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files import write_aside
from pretrain.config import Config, load_config
from pretrain.errors import UsageError
from pretrain.probe import Row
from pretrain.run import CONFIG, read_ranks
from pretrain.tracking import read_metrics

PRODUCTS = {"qk": "W_QK", "vp": "W_VP"}
_LABELS = {"qk": r"$W_{QK}$", "vp": r"$W_{VP}$"}


@dataclass(frozen=True)
class RunData:
    """What the page needs of one run."""

    path: Path
    config: Config
    ranks: list[Row]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any] | None

    @property
    def decay(self) -> float:
        """λ of the attention matrices (the mean, should they differ) at the last measurement."""
        values = [(row["decay_a"] + row["decay_b"]) / 2 for row in self.final]
        return round(sum(values) / max(1, len(values)), 12)

    @property
    def exposure(self) -> float:
        """Σηλ over the steps so far."""
        return sum(row["learning_rate"] for row in self.metrics) * self.decay

    @property
    def final(self) -> list[Row]:
        """Rows of the last measurement, heads only."""
        last = max(row["step"] for row in self.ranks)
        return [row for row in self.ranks if row["step"] == last and row["level"] == "head"]

    def mean(self, product: str, column: str) -> float:
        """Mean over the heads of all layers at the last measurement."""
        values = [row[column] for row in self.final if row["product"] == product]
        return sum(values) / len(values)


def load_run(path: Path) -> RunData:
    """Read a run folder.

    Raises:
        UsageError: if it is none, or nothing was measured in it.
    """
    if not (path / CONFIG).is_file():
        raise UsageError(f"{path}: not a run folder (no {CONFIG})")
    ranks = read_ranks(path)
    if not ranks:
        raise UsageError(f"{path}: nothing measured yet; let it train")
    evaluation = path / "evaluation.json"
    return RunData(
        path,
        load_config(path / CONFIG),
        ranks,
        read_metrics(path),
        json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.exists() else None,
    )


Table = list[dict[str, Any]]


def write_report(paths: list[Path], out: Path) -> Table:
    """Write the page, and the overview picture beside it.

    Returns:
        The summary table, one row per run, by λ.
    """
    runs = sorted((load_run(path) for path in paths), key=lambda run: (run.decay, str(run.path)))
    table = [_summary(run) for run in runs]
    figures = [
        (_overview, "Pseudo-rank of both products, mean over all heads: during training, and at "
         "its end against the decay of the attention matrices."),
        (_by_layer, "Pseudo-rank at the end of training against decay, layer by layer; the band "
         "spans the heads."),
        (_balance, "Balance ‖W‖<sub>*</sub> / ½(‖A‖²+‖B‖²) and relative discrepancy "
         "‖AᵀA − BᵀB‖ / ½(‖A‖²+‖B‖²) of the factors, mean over heads. Under decay theory sends "
         "the first to 1 and the second to 0, with AdamW down to a floor of noise (grouped-query "
         "attention and rotary positions: per group and per frequency pair)."),
        (_losses, "Training loss (running mean) and held-out loss on the fixed sample."),
    ]  # fmt: skip
    parts = []
    for draw, caption in figures:
        png = _png(draw, runs)
        if draw is _overview:
            write_aside(out.with_suffix(".png"), png)
        image = base64.b64encode(png).decode()
        parts.append(
            f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{image}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    write_aside(out, _page(runs, table, parts).encode())
    return table


def _summary(run: RunData) -> dict[str, Any]:
    overall = (run.evaluation or {}).get("overall", {})
    return {
        "run": run.path.name,
        "decay": run.decay,
        "exposure": run.exposure,
        "rank_qk": run.mean("qk", "pseudo_rank"),
        "rank_vp": run.mean("vp", "pseudo_rank"),
        "balance_qk": run.mean("qk", "balance"),
        "balance_vp": run.mean("vp", "balance"),
        "perplexity": overall.get("perplexity"),
        "bits_per_byte": overall.get("bits_per_byte"),
    }


_COLUMNS = {
    "run": ("run", "{}"),
    "decay": ("λ attention", "{:g}"),
    "exposure": ("exposure Σηλ", "{:.2f}"),
    "rank_qk": ("rank W_QK", "{:.3f}"),
    "balance_qk": ("balance", "{:.3f}"),
    "rank_vp": ("rank W_VP", "{:.3f}"),
    "balance_vp": ("balance", "{:.3f}"),
    "perplexity": ("test perplexity", "{:.2f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
}


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        "–" if row[key] is None else form.format(row[key]) for key, (_, form) in _COLUMNS.items()
    ]


def print_table(table: Table) -> None:
    """The summary on standard output."""
    import sys

    from rich.console import Console
    from rich.table import Table as RichTable

    shown = RichTable(title="attention decay, rank and held-out perplexity")
    for title, _ in _COLUMNS.values():
        shown.add_column(title, justify="left" if title == "run" else "right")
    for row in table:
        shown.add_row(*_cells(row))
    Console(width=None if sys.stdout.isatty() else 120).print(shown)


# --- figures --------------------------------------------------------------------------------


def _png(draw: Callable[[Any, list[RunData]], None], runs: list[RunData]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "font.size": 10,
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figure = plt.figure(figsize=(10, 3.6), layout="constrained")
        draw(figure, runs)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        plt.close(figure)
    return buffer.getvalue()


def _colours(runs: list[RunData]) -> list[Any]:
    import matplotlib

    # Viridis is ordered in lightness: legible in print and to colour-blind readers.
    colour = matplotlib.colormaps["viridis"]
    return [colour(0.9 * index / max(1, len(runs) - 1)) for index in range(len(runs))]


def _over_training(run: RunData, product: str, value: Callable[[Row], float]) -> Any:
    found: dict[int, list[float]] = defaultdict(list)
    for row in run.ranks:
        if row["product"] == product and row["level"] == "head":
            found[row["step"]].append(value(row))
    steps = sorted(found)
    return steps, [sum(found[step]) / len(found[step]) for step in steps]


def _rank(row: Row) -> float:
    return float(row["pseudo_rank"])


def _decay_axis(axes: Any, runs: list[RunData]) -> None:
    smallest = min((run.decay for run in runs if run.decay > 0), default=1.0)
    axes.set_xscale("symlog", linthresh=smallest)
    axes.set_xticks(sorted({run.decay for run in runs}))
    axes.set_xticklabels([f"{decay:g}" for decay in sorted({run.decay for run in runs})])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("decay of attention, λ")


def _overview(figure: Any, runs: list[RunData]) -> None:
    left, middle, right = figure.subplots(1, 3)
    for axes, product in ((left, "qk"), (middle, "vp")):
        for run, colour in zip(runs, _colours(runs), strict=True):
            axes.plot(
                *_over_training(run, product, _rank), color=colour, label=f"λ = {run.decay:g}"
            )
        axes.set(title=f"{_LABELS[product]} during training", xlabel="step", ylim=(0, 1))
    left.set_ylabel("pseudo-rank")
    middle.legend(loc="upper right")
    for product, marker in (("qk", "o-"), ("vp", "s--")):
        decays = [run.decay for run in runs]
        right.plot(
            decays,
            [run.mean(product, "pseudo_rank") for run in runs],
            marker,
            color="black",
            markerfacecolor="white" if product == "vp" else "black",
            label=_LABELS[product],
        )
    _decay_axis(right, runs)
    right.set(title="at the end", ylim=(0, 1))
    right.legend()


def _by_layer(figure: Any, runs: list[RunData]) -> None:
    import matplotlib

    layers = sorted({row["layer"] for row in runs[0].final})
    for axes, product in zip(figure.subplots(1, 2), PRODUCTS, strict=True):
        for index, layer in enumerate(layers):
            colour = matplotlib.colormaps["cividis"](0.85 * index / max(1, len(layers) - 1))
            heads = [
                [
                    r["pseudo_rank"]
                    for r in run.final
                    if (r["layer"], r["product"]) == (layer, product)
                ]
                for run in runs
            ]
            decays = [run.decay for run in runs]
            means = [sum(values) / len(values) for values in heads]
            axes.plot(decays, means, "o-", color=colour, label=f"layer {layer}")
            low, high = [min(values) for values in heads], [max(values) for values in heads]
            axes.fill_between(decays, low, high, color=colour, alpha=0.15, linewidth=0)
        _decay_axis(axes, runs)
        axes.set(title=_LABELS[product], ylabel="pseudo-rank", ylim=(0, 1))
        axes.legend(ncols=2, fontsize=8)


def _balance(figure: Any, runs: list[RunData]) -> None:
    def relative(row: Row) -> float:
        return float(row["discrepancy"] / row["frobenius_bound"]) if row["frobenius_bound"] else 0.0

    rows = figure.subplots(1, 4)
    for axes, (product, what) in zip(
        rows, [(p, w) for w in ("balance", "discrepancy") for p in PRODUCTS], strict=True
    ):
        value = (lambda row: float(row["balance"])) if what == "balance" else relative
        for run, colour in zip(runs, _colours(runs), strict=True):
            axes.plot(
                *_over_training(run, product, value), color=colour, label=f"λ = {run.decay:g}"
            )
        axes.set(title=f"{what}, {_LABELS[product]}", xlabel="step")
        if what == "discrepancy":
            axes.set_yscale("log")
    rows[0].legend(fontsize=8)


def _losses(figure: Any, runs: list[RunData]) -> None:
    left, right = figure.subplots(1, 2)
    for run, colour in zip(runs, _colours(runs), strict=True):
        steps = [row["step"] for row in run.metrics]
        losses = [row["loss"] for row in run.metrics]
        width = max(1, len(losses) // 30)
        smooth = [
            sum(losses[max(0, i - width) : i + 1]) / len(losses[max(0, i - width) : i + 1])
            for i in range(len(losses))
        ]
        left.plot(steps, smooth, color=colour, label=f"λ = {run.decay:g}")
        held = read_metrics(run.path, "evaluation")
        right.plot([row["step"] for row in held], [row["loss"] for row in held], ".-", color=colour)
    left.set(title="training", xlabel="step", ylabel="loss, nats per token")
    right.set(title="held out", xlabel="step")
    left.legend()


# --- page -----------------------------------------------------------------------------------

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:1rem 0}
th,td{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left;white-space:nowrap}.wide{overflow-x:auto}
figure{margin:2rem 0}img{width:100%;height:auto}figcaption{color:#555;font-size:.9rem}
"""


def _page(runs: list[RunData], table: Table, figures: list[str]) -> str:
    model, config = runs[0].config.model, runs[0].config
    head = "".join(f"<th>{html.escape(title)}</th>" for title, _ in _COLUMNS.values())
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row)) + "</tr>"
        for row in table
    )
    setting = (
        f"{model.dialect.value}, {model.num_layers} layers, width {model.hidden_size}, "
        f"{model.num_attention_heads} heads, context {model.context}; {config.train.steps} steps "
        f"of {config.train.global_batch * model.context:,} tokens, seed {config.seed}; "
        f"{len(runs)} run{'s' * (len(runs) > 1)}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Attention decay and rank</title><style>{_STYLE}</style></head><body>"
        f"<h1>Attention decay and rank</h1><p>{html.escape(setting)}</p>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f"{_subset_table(runs)}{''.join(figures)}</body></html>"
    )


def _subset_table(runs: list[RunData]) -> str:
    """Test perplexity of every run on every subset."""
    scored = [run for run in runs if run.evaluation]
    if not scored:
        return ""
    names = sorted({name for run in scored for name in (run.evaluation or {})["subsets"]})
    head = "".join(f"<th>λ = {run.decay:g}</th>" for run in scored)
    rows = ""
    for name in [*names, "all"]:
        cells = ""
        for run in scored:
            figures = run.evaluation or {}
            found = figures["overall"] if name == "all" else figures["subsets"].get(name)
            cells += f"<td>{found['perplexity']:.2f}</td>" if found else "<td>–</td>"
        rows += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    return (
        "<h2>Test perplexity by subset</h2><div class='wide'><table><thead><tr><th>subset</th>"
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
