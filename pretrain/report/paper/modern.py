"""Beyond the paper: variants of attention in use today, on trained small models.

The plain theory is for multi-head attention without rotary positions or QK-norm
(docs/statistics.md). With grouped queries the law applies to the group, as long as gradients
determine sizes (under AdamW, the step size determines the size of every matrix). With rotary
positions the law applies to each frequency pair. With QK-norm, decay has no nuclear mechanism on
W_QK. With biases that do not decay, it applies only to the weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.reader import Checkpoint
from pretrain.config.recipe import Config
from pretrain.errors import UsageError
from pretrain.report.load import RunData
from pretrain.report.paper.checks import Check, conclude
from pretrain.report.paper.runs import given_decay, load_runs, mean, values
from pretrain.runs.folder import resolve_checkpoint
from pretrain.runs.outputs import write_csv, write_figure
from pretrain.spectra import product_statistics

_FALL = 0.5
"""A rank counts as fallen if it is below this share of the rank without decay."""


def variant(config: Config) -> str:
    """The name of a model's difference from plain attention."""
    model = config.model
    if model.attention != "softmax":
        return f"{model.attention} attention"
    if model.key_value_heads < model.num_attention_heads:
        return "grouped-query" + (", SGD" if config.optimizer.name == "sgd" else "")
    if model.position == "rotary":
        return "rotary"
    if model.qk_norm:
        return "QK-norm"
    if model.biases:
        return "biases"
    return "Muon" if config.optimizer.name == "muon" else "plain"


Pair = tuple[RunData, RunData]
"""A variant without and with decay of attention."""


def _pairs(runs: list[RunData]) -> dict[str, Pair]:
    by_variant: dict[str, list[RunData]] = {}
    for run in runs:
        by_variant.setdefault(variant(run.config), []).append(run)
    if not all(len(pair) >= 2 for pair in by_variant.values()) or "plain" not in by_variant:
        raise UsageError("modern: every variant needs one run without and one with decay")
    names = sorted(by_variant, key=lambda name: (name != "plain", name))
    return {name: (by_variant[name][0], by_variant[name][-1]) for name in names}


def figure(runs_folder: Path, out: Path) -> None:
    """Draw, write the numbers, print the checks."""
    pairs = _pairs(load_runs(runs_folder))
    out.mkdir(parents=True, exist_ok=True)
    rows = [_row(name, run) for name, pair in pairs.items() for run in pair]
    write_csv(out / "modern.csv", rows)
    _draw(pairs, rows, out / "modern.png")
    conclude("modern", checks(pairs), out, _table(rows))


def _row(name: str, run: RunData) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": name, "decay": given_decay(run), "exposure": run.exposure}
    for product in ("qk", "vp"):
        for column in ("pseudo_rank", "balance"):
            row[f"{column}_{product}"] = mean(values(run, product, column))
        row[f"group_balance_{product}"] = mean(values(run, product, "balance", level="group"))
    row["pair_balance"] = mean(values(run, "qk", "rope_pair_balance"))
    row["pairs_alive"] = mean(values(run, "qk", "rope_pairs_alive"))
    row["loss"] = (run.evaluation or {})["overall"]["loss"]
    return row


def _ratio(pair: Pair, product: str, column: str = "pseudo_rank") -> float:
    without, with_decay = (mean(values(run, product, column)) for run in pair)
    return with_decay / without


def checks(pairs: dict[str, Pair]) -> list[Check]:
    """The prediction of each variant, with its number."""
    plain = pairs["plain"]
    results = [_falls("plain attention", plain)]
    balances = [mean(values(plain[1], product, "balance")) for product in ("qk", "vp")]
    words = f"{balances[0]:.3f}, {balances[1]:.3f}"
    results.append(
        Check("plain: heads reach their bound (W_QK, W_VP)", 1 - min(balances), 0.05, words)
    )
    if "grouped-query" in pairs:
        results += _grouped(pairs["grouped-query"])
    if "grouped-query, SGD" in pairs:
        results += _grouped_by_gradients(pairs["grouped-query, SGD"])
    if "rotary" in pairs:
        results += _rotary(pairs["rotary"])
    if "QK-norm" in pairs:
        normed, bare = _ratio(pairs["QK-norm"], "qk"), _ratio(plain, "qk")
        words = f"{normed:.2f} of the rank without decay is left, against {bare:.2f} plain"
        claim = (
            "QK-norm: decay removes less rank of W_QK than without QK-norm (no nuclear mechanism)"
        )
        results.append(Check(claim, bare - normed, 0.0, words))
        share_left = _ratio(pairs["QK-norm"], "vp")
        claim = "QK-norm: the rank of W_VP still falls"
        results.append(Check(claim, share_left - _FALL, 0.0, f"{share_left:.2f} is left"))
    if "biases" in pairs:
        results += _biased(pairs["biases"])
    for name in ("linear attention", "sigmoid attention"):
        if name in pairs:
            results.append(_falls(name, pairs[name]))
    if "Muon" in pairs:
        qk, vp = (_ratio(pairs["Muon"], product) for product in ("qk", "vp"))
        adam = max(_ratio(plain, product) for product in ("qk", "vp"))
        words = f"W_QK {qk:.2f}, W_VP {vp:.2f} of the rank is left"
        claim = "Muon: decay removes less rank than under AdamW (Muon's step has full rank)"
        results.append(Check(claim, adam - min(qk, vp), 0.0, words))
    return results


def _falls(name: str, pair: Pair) -> Check:
    qk, vp = (_ratio(pair, product) for product in ("qk", "vp"))
    words = f"W_QK {qk:.2f}, W_VP {vp:.2f} of the rank without decay is left"
    return Check(f"{name}: both ranks fall with decay", max(qk, vp) - _FALL, 0.0, words)


def _grouped(pair: Pair) -> list[Check]:
    """Under AdamW all matrices end at the same size per element (its rotational equilibrium).

    Then the g query heads together have g times the key's ‖·‖², each head is balanced, and the
    group's Σσ / ½(‖A‖² + Σ‖Bᵢ‖²) can be at most 2√g / (1 + g).
    """
    g = pair[1].config.model.num_attention_heads // pair[1].config.model.key_value_heads
    ceiling = 2 * math.sqrt(g) / (1 + g)
    results = []
    for product, word in (("qk", "W_QK"), ("vp", "W_VP")):
        group, head = _group_and_head(pair, product)
        words = f"single heads {head:.3f}, group {group:.3f}, 2√g/(1 + g) = {ceiling:.3f}"
        claim = f"grouped queries, AdamW: heads of {word} are at their bound, the group is not"
        missed = max(1 - head, abs(group - ceiling))
        results.append(Check(claim, missed, 0.05, words))
    return results


def _grouped_by_gradients(pair: Pair) -> list[Check]:
    """Under gradient descent AᵀA − ΣBᵢᵀBᵢ decays, and the stacked product nears its bound."""
    results = []
    for product, word in (("qk", "W_QK"), ("vp", "W_VP")):
        group, head = _group_and_head(pair, product)
        words = f"group {group:.3f}, single heads {head:.3f}"
        claim = f"grouped queries, SGD: the law is the group's; its stacked {word} nears the bound"
        results.append(Check(claim, 1 - group, 0.12, words))
    return results


def _group_and_head(pair: Pair, product: str) -> tuple[float, float]:
    """Balance of the groups and of their heads, with decay."""
    group = mean(values(pair[1], product, "balance", level="group"))
    return group, mean(values(pair[1], product, "balance"))


def _rotary(pair: Pair) -> list[Check]:
    pairs = mean(values(pair[1], "qk", "rope_pair_balance"))
    plain = mean(values(pair[1], "qk", "balance"))
    alive = [mean(values(run, "qk", "rope_pairs_alive")) for run in pair]
    missed = max(1 - pairs - 0.05, plain - pairs)
    words = f"pairs {pairs:.3f}, W_QK as a whole {plain:.3f}"
    pruned = f"share of pairs alive {alive[0]:.2f} → {alive[1]:.2f}"
    return [
        Check("rotary: the balance is that of frequency pairs", missed, 0.0, words),
        Check("rotary: decay prunes frequency pairs", alive[1] - alive[0], 0.0, pruned),
    ]


def _biased(pair: Pair) -> list[Check]:
    """Balance of W_QK without its biases, and with them as one more row of the factors."""
    checkpoint = Checkpoint(resolve_checkpoint(str(pair[1].path)))
    balances: list[list[float]] = [[], []]
    for layer in range(checkpoint.config.model.num_layers):
        factors = checkpoint.attention(layer)
        key, query = factors.key.mT, factors.query[:, 0].mT
        rows = [
            checkpoint.full(f"blocks.{layer}.attention.{part}.bias").view(key.shape[0], 1, -1)
            for part in ("key", "query")
        ]
        augmented = (torch.cat([key, rows[0]], 1), torch.cat([query, rows[1]], 1))
        for index, (a, b) in enumerate(((key, query), augmented)):
            balances[index] += product_statistics(a, b).balance.tolist()
    weights, whole = (mean(samples) for samples in balances)
    words = f"weights {weights:.3f}, with biases {whole:.3f}"
    claim = "biases without decay: the weights are at their bound, with the biases they are not"
    return [Check(claim, max(1 - weights - 0.05, whole - weights), 0.0, words)]


def _table(rows: list[dict[str, Any]]) -> str:
    head = (
        "| variant | λ | rank W_QK | rank W_VP | balance QK (group or pairs) | balance VP (group) |"
        " loss |"
    )
    lines = [head, "|---" * 7 + "|"]
    for row in rows:
        lawful = (row["group_balance_qk"], row["pair_balance"])
        beside = next((f" ({value:.3f})" for value in lawful if not math.isnan(value)), "")
        shared = row["group_balance_vp"]
        group = "" if math.isnan(shared) else f" ({shared:.3f})"
        qk = "n/a" if math.isnan(row["balance_qk"]) else f"{row['balance_qk']:.3f}"
        lines.append(
            f"| {row['variant']} | {row['decay']:g} | {row['pseudo_rank_qk']:.3f} | "
            f"{row['pseudo_rank_vp']:.3f} | {qk}{beside} | {row['balance_vp']:.3f}{group} | "
            f"{row['loss']:.3f} |"
        )  # fmt: skip
    return "\n".join(lines)


def _draw(pairs: dict[str, Pair], rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", sharey=True)
    for axes, product, word in zip(panels, ("qk", "vp"), ("W$_{QK}$", "W$_{VP}$"), strict=False):
        for shift, index in ((-0.2, 0), (0.2, 1)):
            heights = [mean(values(pair[index], product, "pseudo_rank")) for pair in pairs.values()]
            label = ("without decay of attention", "exposure 3")[index]
            axes.bar([x + shift for x in range(len(pairs))], heights, 0.4, label=label)
        axes.set_xticks(range(len(pairs)), list(pairs), rotation=30, ha="right", fontsize=8)
        axes.set(title=f"rank of {word}, all heads")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2, frameon=False)
    write_figure(path, figure)
    plt.close(figure)
