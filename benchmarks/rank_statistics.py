"""How long one full measurement of a model's attention takes, and what the naive way costs.

    python benchmarks/rank_statistics.py [--shape 125m] [--out FILE.json]

Contenders, on random matrices of the same shape, interleaved A B C A B C: `product_statistics`
(head x head matrices, float64) over every head; the singular values of the dense width x width
product; and WeightWatcher's singular values of it, where that is installed. The last two on one
head, scaled up to all of them (they would take minutes to hours). Then, in a training engine of
125 M parameters: a measurement beside an update, and on two ranks of ZeRO-1 the bytes that it
sends beside those of gathering the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results_file import finish
from launchers.local import start_environment, torchrun
from pretrain.spectra import product_statistics

SHAPES = {"125m": (12, 12, 768, 64), "1.3b": (24, 16, 2048, 128), "7b": (32, 32, 4096, 128)}
"""layers, heads, width, head width"""
ROUNDS = {"125m": 5, "1.3b": 3, "7b": 2}


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


def product(width: int, head: int) -> torch.Tensor:
    """One dense product."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(width, head, generator=generator) for _ in range(2))
    return a @ b.T


def naive(width: int, head: int) -> float:
    """Seconds per product by a dense SVD in float32."""
    dense = product(width, head)
    began = time.perf_counter()
    torch.linalg.svdvals(dense)
    return time.perf_counter() - began


def weightwatcher(width: int, head: int) -> float:
    """Seconds per product by WeightWatcher's default SVD; NaN where it is not installed."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it says what it looks for
            from weightwatcher.RMT_Util import svd_vals
    except ImportError:
        return math.nan
    dense = product(width, head).numpy()
    began = time.perf_counter()
    svd_vals(dense)
    return time.perf_counter() - began


def measured(shape: str) -> dict[str, Any]:
    """Medians per model and their ratios."""
    layers, heads, width, head = SHAPES[shape]
    products = 2 * layers * heads
    ours, theirs, watched = [], [], []
    for turn in range(ROUNDS[shape]):
        total = factor_space(layers, heads, width, head)
        ours.append(total - generation(layers, heads, width, head))
        if turn == 0 or shape != "7b":  # ten seconds a product there
            theirs.append(naive(width, head) * products)
            watched.append(weightwatcher(width, head) * products)
    mine = statistics.median(ours)
    ratios = {name: statistics.median(seconds) / mine
              for name, seconds in (("dense SVD", theirs), ("WeightWatcher", watched))}  # fmt: skip
    print(
        f"{shape}: {products} products in {mine:.2f} s ({min(ours):.2f}-{max(ours):.2f}); "
        f"dense SVD {statistics.median(theirs):,.0f} s, x{ratios['dense SVD']:.0f}; "
        f"WeightWatcher's {statistics.median(watched):,.0f} s, x{ratios['WeightWatcher']:.0f}"
    )
    return {
        "products": products,
        "seconds": ours,
        "dense_svd_seconds_scaled": theirs,
        "weightwatcher_seconds_scaled": watched,
        "ratios": ratios,
    }


def in_training(shape: str) -> dict[str, Any]:
    """Share of training time at every 100 steps, and bytes on two ranks."""
    worker = str(ROOT / "benchmarks/contenders/probe_worker.py")
    results = []
    for processes in (1, 2):
        start = [sys.executable] if processes == 1 else torchrun(processes)
        done = subprocess.run(
            [*start, worker, shape], env=start_environment(processes), capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        results.append(json.loads(done.stdout.strip().splitlines()[-1]))
    alone, spread = results
    update, measurement = (
        statistics.median(alone[f"{what}_seconds"]) for what in ("update", "measurement")
    )
    share = measurement / (100 * update + measurement)
    moved = spread["bytes_sent_of_factors"] + spread["bytes_sent_of_results"]
    print(
        f"in training, {shape}: {measurement:.2f} s beside updates of {update:.2f} s: "
        f"{100 * share:.2f} % at every 100; two ranks send {moved / 1e6:.2f} MB, "
        f"{100 * moved / spread['gather_of_weights']:.2f} % of gathering the weights, "
        f"{100 * moved / spread['gather_of_attention']:.2f} % of gathering attention's"
    )
    return {"shape": shape, "share_at_every_100": share, "alone": alone, "two_ranks": spread}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = {name: measured(name) for name in options.shape}
    training = in_training("125m")
    finish({"results": results, "in_training": training}, options.out, show=False)


if __name__ == "__main__":
    main()
