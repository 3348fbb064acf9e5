"""How many small runs to give one device at once: `pretrain sweep --parallel N`.

    python benchmarks/many_runs.py --runs 1 2 --out benchmarks/results/many_runs-cpu.json

So many independent runs train at the same time on one GPU, or on this machine's cores, which they
share; told is the sum of their tokens a second. On a GPU, start it under NVIDIA's MPS too
(`nvidia-cuda-mps-control -d`), where the runs' kernels overlap instead of taking turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.contenders.shapes import SHAPES
from benchmarks.results_file import finish
from benchmarks.training import Contender


def together(contenders: list[Contender], steps: int, tokens: int) -> float:
    """Tokens a second of all, from the first start to the last end."""
    began = time.monotonic()
    with ThreadPoolExecutor(len(contenders)) as pool:
        list(pool.map(lambda contender: contender.run(steps, tokens), contenders))
    return len(contenders) * steps * tokens / (time.monotonic() - began)


def main() -> None:
    """Measure by turns and print; JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="tiny", choices=sorted(SHAPES))
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    tokens = shape.batch * shape.context
    cores = os.cpu_count() or 1
    crews: dict[int, list[Contender]] = {}
    for runs in options.runs:
        threads = cores if torch.cuda.is_available() else max(1, cores // runs)
        crews[runs] = [Contender("rankdecay-eager", options.shape, threads) for _ in range(runs)]
        together(crews[runs], 3, tokens)
    rates_by_runs: dict[int, list[float]] = {runs: [] for runs in crews}
    for turn in range(options.turns):
        for runs in list(crews)[:: 1 if turn % 2 == 0 else -1]:
            rates_by_runs[runs].append(together(crews[runs], options.steps, tokens))
    for crew in crews.values():
        for contender in crew:
            contender.close()
    middle = {runs: statistics.median(rates) for runs, rates in rates_by_runs.items()}
    first = next(iter(middle.values()))
    for runs, rate in middle.items():
        spread = f"{min(rates_by_runs[runs]):,.0f}-{max(rates_by_runs[runs]):,.0f}"
        print(f"{runs} at once: {rate:,.0f} tokens/s in all ({spread}), x{rate / first:.2f}")
    figures: dict[str, Any] = {"shape": options.shape, "tokens_per_second": rates_by_runs}
    finish(figures, options.out, show=False)


if __name__ == "__main__":
    main()
