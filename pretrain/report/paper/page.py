"""One page with all figures: the paper's claim, our figure, our number, and whether they agree."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_pipeline.files import write_aside
from pretrain.runs.environment import environment

TITLES = {
    "fig1": (
        "Figure 1: two factors by gradient descent",
        "With decay the gap between ½(‖A‖² + ‖B‖²) and ‖ABᵀ‖_* closes exponentially, singular "
        "values fall linearly with λ and vanish; without decay neither happens. The loss here is "
        "‖ABᵀ − D‖² + λ/2(‖A‖² + ‖B‖²), without ½ before the first term, so a level s ends at "
        "max(s − λ/2, 0); with the ½ it would be max(s − λ, 0), as the paper's plot is labelled.",
    ),
    "fig2": (
        "Figure 2: associative recall",
        "In an attention-only model the rank of attention falls with λ, and ‖AᵀA − BᵀB‖ decays "
        "with a time constant that follows λ.",
    ),
    "fig3": (
        "Figure 3, left: a language model",
        "The mean rank of W_QK and W_VP falls monotonically with the decay of attention (paper: "
        "layer 5 of 12; here the layer at the same depth of a small model).",
    ),
    "fig7": ("Figure 7: other layers", "The same in layers 7 and 9 of 12 (here at their depth)."),
    "table1": (
        "Table 1: perplexity by attention and MLP decay",
        "The paper's findings: for the MLP, more decay than 0.1 continues to help; for attention, "
        "decay near 0.1 is best and more hurts. A model trained on a quarter of a million tokens "
        "need not show either, so both are reported here but not required. "
        "`configs/paper/fig3-125m.yaml` is the experiment at the paper's scale.",
    ),
    "fig3-vit": (
        "Figure 3, right: a Vision Transformer",
        "The rank over all heads and layers falls with the decay of attention (paper: ImageNet; "
        "here scikit-learn's digits; `configs/paper/fig3-vit-imagenet.yaml` for ImageNet).",
    ),
    "fig4": (
        "Figure 4: a trained language model's factors",
        "The row norms of W_Q and W_K, and of W_V and P, lie on the diagonal, and norms are at "
        "their bound (paper: LLaMA-2-7B, `pretrain paper fig4 --model FOLDER`; here the means over "
        "our runs whose exposure is nearest to LLaMA-2-7B's, about 8).",
    ),
    "fig6": (
        "Figure 6: a trained Vision Transformer's factors",
        "The same (paper: ViT-B/16, `pretrain paper fig6 --model FOLDER`; here our run whose "
        "exposure is nearest to 3).",
    ),
    "fig5": (
        "Figure 5: AdamW's decay and L2",
        "For a plain parameter, both end at the L2 point of the curve; for a product of two, at "
        "its L1 point. λ_L2 = λ_wd·ε/(1 − λ_wd|w|) is exact, λ_wd·ε (the paper's) is approximate.",
    ),
    "modern": (
        "Beyond the paper: variants of attention in use today",
        "Grouped queries, rotary positions, QK-norm, biases, other mixing functions and Muon: "
        "two-layer models, trained without decay of attention and with an exposure of 3. The SGD "
        "models of grouped queries are one of five settings that were tried (rate x momentum). At "
        "rates of 0.2 and more, the group nears its bound. At 0.03 and 0.1, where attention hardly "
        "learns, W_QK of the group does not (0.77, 0.86).",
    ),
    "rank-cost": (
        "Beyond the paper: the cost of using the low rank",
        "After training, every head's W_QK and W_VP are cut to a share of their singular values, "
        "in language models (whose small attention matters little) and in recall models (which "
        "consist of attention only).",
    ),
}


def write_page(path: Path, figures: Path, names: list[str]) -> None:
    """Collect ``NAME.json`` and ``NAME.png`` of every figure in one Markdown page."""
    parts = [_head(names, figures)]
    for name in names:
        source = figures / f"{name}.json"
        title, claim = TITLES[name]
        lines = [f"## {title}", "", claim, ""]
        if not source.exists():
            lines += ["not run", ""]
        else:
            body = json.loads(source.read_text(encoding="utf-8"))
            image = os.path.relpath(figures / f"{name}.png", path.parent)
            lines += [f"![{title}]({image})", "", *_checks(body["checks"])]
            lines += [body["extra"], ""] if body["extra"] else []
        parts.append("\n".join(lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, ("\n".join(parts).rstrip() + "\n").encode())


def _head(names: list[str], figures: Path) -> str:
    machine = environment()
    versions = ", ".join(f"{key} {value}" for key, value in machine["versions"].items() if value)
    rows = []
    for name in names:
        source = figures / f"{name}.json"
        checks = json.loads(source.read_text(encoding="utf-8"))["checks"] if source.exists() else []
        required = [check for check in checks if check["decides"]]
        optional = [check for check in checks if not check["decides"]]
        passed = sum(check["holds"] for check in required)
        extra = (
            f"; {sum(check['holds'] for check in optional)} of {len(optional)} not required"
            if optional
            else ""
        )
        anchor = "".join(c for c in TITLES[name][0].lower() if c.isalnum() or c in " -")
        link = f"[{TITLES[name][0]}](#{anchor.replace(' ', '-')})"
        rows.append(f"| {link} | `pretrain paper {name}` | {passed} of {len(required)}{extra} |")
    return "\n".join([
        "# The paper, figure by figure",
        "",
        f"Written by `pretrain paper all` on {datetime.now(UTC):%Y-%m-%d}: {machine['cores']} CPU "
        f"cores, {machine['gpu'] or 'no GPU'}, Python {machine['python']}, {versions}. Each figure "
        "has a command, a CSV and a JSON file with its checks; a check that fails makes the "
        "command fail. The paper's experiments are repeated at a size for two cores, with decays "
        "chosen by exposure Σηλ.",
        "",
        "| figure | command | predictions that hold |",
        "|---|---|---|",
        *rows,
        "",
    ])  # fmt: skip


def _checks(checks: list[dict[str, Any]]) -> list[str]:
    lines = ["| prediction | measured | deviation (allowed) | |", "|---|---|---|---|"]
    for check in checks:
        verdict = "agrees" if check["holds"] else "disagrees"
        if not check["decides"]:
            verdict += " (not required)"
        cells = (
            check["claim"],
            check["value"] or "–",
            f"{check['deviation']:.2g} ({check['tolerance']:g})",
            verdict,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]
