"""How long one full measurement of a model's attention takes, and what the naive way costs.

    python benchmarks/rank_statistics.py [--shape 125m] [--naive-heads 2] [--out FILE.json]

Contenders, on the same random matrices, interleaved A B A B: `product_statistics` (head x head
matrices, float64) over every head; and the singular values of the dense width x width product,
over a few heads, scaled up to all of them (it would take minutes to hours).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.spectra import product_statistics

SHAPES = {"125m": (12, 12, 768, 64), "1.3b": (24, 16, 2048, 128), "7b": (32, 32, 4096, 128)}
"""layers, heads, width, head width"""


def factor_space(layers: int, heads: int, width: int, head: int) -> float:
    """Seconds for both products of every head, layer by layer."""
    began = time.perf_counter()
    for layer in range(layers):
        generator = torch.Generator().manual_seed(layer)
        for _ in range(2):
            a, b = (torch.randn(heads, width, head, generator=generator) for _ in range(2))
            product_statistics(a, b)
    return time.perf_counter() - began


def generation(layers: int, heads: int, width: int, head: int) -> float:
    """Seconds that making the random matrices takes, to be taken off."""
    began = time.perf_counter()
    for layer in range(layers):
        generator = torch.Generator().manual_seed(layer)
        for _ in range(4):
            torch.randn(heads, width, head, generator=generator)
    return time.perf_counter() - began


def naive(width: int, head: int, count: int) -> float:
    """Seconds per product by a dense SVD in float32."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(count, width, head, generator=generator) for _ in range(2))
    began = time.perf_counter()
    for left, right in zip(a, b, strict=True):
        torch.linalg.svdvals(left @ right.T)
    return (time.perf_counter() - began) / count


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--naive-heads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = {}
    for name in options.shape or ["125m"]:
        layers, heads, width, head = SHAPES[name]
        ours, theirs = [], []
        for _ in range(options.rounds):
            total = factor_space(layers, heads, width, head)
            ours.append(total - generation(layers, heads, width, head))
            theirs.append(naive(width, head, options.naive_heads) * 2 * layers * heads)
        ratio = [b / a for a, b in zip(ours, theirs, strict=True)]
        results[name] = {
            "products": 2 * layers * heads,
            "seconds": ours,
            "naive_seconds_scaled": theirs,
            "ratio_median": statistics.median(ratio),
        }
        print(
            f"{name}: {2 * layers * heads} products in {statistics.median(ours):.2f} s "
            f"({min(ours):.2f}-{max(ours):.2f}); naive {statistics.median(theirs):.0f} s; "
            f"{statistics.median(ratio):.0f}x"
        )
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "results": results,
    }
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
