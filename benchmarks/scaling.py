"""Predicted speed from 1 to 1,024 GPUs: `pretrain plan`'s best grid at each count.

    python benchmarks/scaling.py --out docs

Writes scaling.csv and scaling.png there, and prints the table of docs/scaling.md. Nothing is run:
formulas and published rates.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.cluster.plan import rank
from pretrain.config.recipe import parse_config
from pretrain.engine.accelerators import DEVICES

MODELS = {  # layers, hidden, heads: GPT-3's, and GPT-NeoX-20B's
    "125M": (12, 768, 12),
    "350M": (24, 1024, 16),
    "1.3B": (24, 2048, 16),
    "6.7B": (32, 4096, 32),
    "20B": (44, 6144, 64),
}
COUNTS = [1 << bits for bits in range(11)]
BATCH, CONTEXT = 1024, 2048


def rows(gpu: str) -> list[dict[str, Any]]:
    """The best grid of each model and count; those that nothing fits on are left out."""
    choices = []
    for name, (layers, hidden, heads) in MODELS.items():
        config = parse_config(
            {
                "model": {"dialect": "gpt_neox", "num_layers": layers, "hidden_size": hidden,
                          "num_attention_heads": heads, "context": CONTEXT,
                          "vocabulary_size": 50_304},
                "train": {"global_batch": BATCH},
            }
        )  # fmt: skip
        for count in COUNTS:
            best = rank(config, DEVICES[gpu], count, 1)[0]
            if not best.fits:
                continue
            choices.append(
                {
                    "model": name, "gpus": count, "tensor": best.tensor,
                    "pipeline": best.pipeline, "data": best.data, "zero": best.zero_stage,
                    "micro_batch": best.micro_batch, "recompute": best.recompute,
                    "gb_a_rank": round(best.total / 1e9, 1),
                    "seconds": round(best.seconds["step"], 4),
                    "tokens_per_second": round(BATCH * CONTEXT / best.seconds["step"]),
                    "mfu": round(best.mfu, 3),
                }
            )  # fmt: skip
    return choices


def draw(points: list[dict[str, Any]], gpu: str, path: Path) -> None:
    """Speed against the number of GPUs, with straight lines for perfect scaling."""
    import matplotlib

    matplotlib.use("Agg")
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # fonts of labels
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in MODELS:
        mine = [row for row in points if row["model"] == name]
        counts = [row["gpus"] for row in mine]
        (line,) = axes.loglog(
            counts, [row["tokens_per_second"] for row in mine], "o-", ms=3, label=name
        )
        first = mine[0]["tokens_per_second"] / counts[0]
        axes.loglog(counts, [first * n for n in counts], ":", lw=1, color=line.get_color())
    axes.set(xlabel=f"{gpu.upper()}s", ylabel="tokens a second (predicted)")
    axes.legend(title="parameters")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> None:
    """Write and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="h100", choices=sorted(DEVICES))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    choices = rows(options.gpu)
    with (options.out / "scaling.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(choices[0]))
        writer.writeheader()
        writer.writerows(choices)
    draw(choices, options.gpu, options.out / "scaling.png")
    print("| model | GPUs | tensor x pipeline x data, ZeRO | GB per GPU | tokens/s | MFU |")
    print("|---|---:|---|---:|---:|---:|")
    for row in choices:
        if row["gpus"] in (1, 8, 64, 512, 1024):
            grid = f"{row['tensor']} x {row['pipeline']} x {row['data']}, {row['zero']}"
            print(
                f"| {row['model']} | {row['gpus']:,} | {grid} | {row['gb_a_rank']} | "
                f"{row['tokens_per_second']:,} | {100 * row['mfu']:.0f} % |"
            )


if __name__ == "__main__":
    main()
