"""Training speed beside what one would use instead: the same model, by turns, in one run.

    python benchmarks/training.py --out benchmarks/results/training-cpu.json

Each contender is a process that keeps its model; by turns each makes some updates (A B C A B C ...)
while the others wait. On a GPU, contenders of large models (`TOGETHER`) run one after another, and
of middle ones only rankdecay and the plain loop take turns. The table has medians of tokens a
second with their quartiles, the share of the matrix-product rate measured in the same run (model
flops, `shapes.Shape.flops_per_token`), and the peak of resident (or GPU) memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.contenders.common import half
from benchmarks.contenders.shapes import SHAPES, Shape
from benchmarks.contenders.worker import GRIDS, recipe_values
from benchmarks.results_file import finish
from launchers.local import torchrun
from pretrain.cluster.local_rates import measure_here, product_rate
from pretrain.cluster.plan import choose
from pretrain.config.recipe import parse_config

WORKER = ROOT / "benchmarks/contenders/worker.py"
PEERS = ("plain", "litgpt", "trainer")
EAGER = ("rankdecay-eager", "plain-eager", "trainer-eager")
MATCHES = {
    "tiny": ("rankdecay", *PEERS, *EAGER),
    "17m": ("rankdecay", *PEERS, *EAGER, "tensor-2", "pipeline-2", "data-2"),
    "125m": ("rankdecay", "rankdecay-eager", *PEERS),  # their memory is held at the same time
}
ON_GPU = {
    "gpu-7m": ("rankdecay", "plain", "litgpt", "trainer"),
    "gpu-125m": ("rankdecay", "plain", "litgpt", "trainer"),
    "gpu-llama": ("rankdecay", "plain", "litgpt", "trainer", "torchtitan"),
    "gpu-350m": ("rankdecay", "plain"),
    "gpu-1.3b": ("rankdecay", "plain"),
}
STEPS = {
    "tiny": 4, "17m": 4, "125m": 1, "gpu-7m": 60, "gpu-125m": 10, "gpu-llama": 10, "gpu-350m": 5,
    "gpu-1.3b": 3,
}  # fmt: skip
"""Updates of a turn."""
TOGETHER = 6e13
"""FLOPs of an update, summed over contenders, up to which all are on one GPU at once; they stand
for the memory that the contenders need, which is not known before."""
_WARM = 6
"""Updates before the first turn: the compiler's, and those that a CUDA graph is made from."""


def processes_of(name: str) -> int:
    """How many a contender has."""
    return 2 if name.endswith("-2") else 1


class Contender:
    """A worker process and what it answered."""

    def __init__(self, name: str, shape: str, cores: int = 0) -> None:
        """
        Args:
            cores: threads of each process; 0: all, or shared out among several processes.
        """
        self.name = name
        self._messages = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.rates: list[float] = []
        self.peak, self.loss = 0, float("nan")
        processes = processes_of(name)
        start = [sys.executable] if processes == 1 else torchrun(processes)
        if processes > 1:
            cores = (os.cpu_count() or 2) // processes
        threads = {"OMP_NUM_THREADS": str(cores)} if cores else {}
        self._process = subprocess.Popen(
            [*start, str(WORKER), name, shape],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages, text=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **threads},
        )  # fmt: skip
        self.alive = True

    def run(self, steps: int, tokens: int, count: bool = True) -> None:
        """Some updates; a contender that dies is left out from there on."""
        self.ask(steps)
        self.answer(steps, tokens, count)

    def ask(self, steps: int) -> None:
        """Let it make some updates, as soon as it is ready."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()

    def answer(self, steps: int, tokens: int, count: bool = True) -> None:
        """Wait for the updates that it was asked for."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.strip() == "ready":
            line = self._process.stdout.readline()
        if not line:
            self.alive = False
            return
        answer = json.loads(line)
        self.peak, self.loss = answer["peak"], answer["loss"]
        if count:
            self.rates.append(steps * tokens / answer["seconds"])

    def why_not(self) -> str:
        """The last line of its messages: an error, if it died."""
        self._messages.seek(0)
        lines = [line for line in self._messages.read().splitlines() if line.strip()]
        return lines[-1].strip() if lines else "no message"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def fits_together(shape: Shape, contenders: int) -> bool:
    """Whether the models of all contenders fit into this machine's memory."""
    flops = shape.flops_per_token * shape.batch * shape.context
    return not torch.cuda.is_available() or contenders * flops < TOGETHER


def divided(shape: Shape, names: list[str]) -> list[list[str]]:
    """Contenders that take turns: all, or rankdecay and the plain loop, or none."""
    if fits_together(shape, len(names)):
        return [names]
    pair = [name for name in names if name in ("rankdecay", "plain")]
    if len(pair) < 2 or not fits_together(shape, 2):
        pair = []
    return [*([pair] if pair else []), *([name] for name in names if name not in pair)]


def by_turns(
    shape_name: str, names: list[str], turns: int, steps: int, limits: list[float]
) -> list[Contender]:
    """Contenders that have run interleaved and ended; rates of products are added to ``limits``."""
    tokens = SHAPES[shape_name].batch * SHAPES[shape_name].context
    contenders = []
    for name in names:  # start, compile and warm up: on a GPU, by many cores, together
        contenders.append(Contender(name, shape_name))
        contenders[-1].ask(_WARM)
        if not torch.cuda.is_available():
            contenders[-1].answer(_WARM, tokens, count=False)
    if torch.cuda.is_available():
        for contender in contenders:
            contender.answer(_WARM, tokens, count=False)
    for turn in range(turns):
        limits.append(product_rate(2 if half() else 4))
        for contender in [contenders, contenders[::-1]][turn % 2]:
            if contender.alive:
                contender.run(steps, tokens)
    for contender in contenders:
        contender.close()
    return contenders


def measure(shape_name: str, names: list[str], turns: int, steps: int) -> dict[str, object]:
    """Interleave the contenders on one shape."""
    shape: Shape = SHAPES[shape_name]
    limits: list[float] = []
    contenders: list[Contender] = []
    for part in divided(shape, names):
        contenders += by_turns(shape_name, part, turns, steps, limits)
    limit = statistics.median(limits)
    rows: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        if not contender.rates:
            rows[contender.name] = {"failed": contender.why_not()}
            continue
        quarters = (
            statistics.quantiles(contender.rates, n=4)
            if len(contender.rates) > 1
            else contender.rates * 3
        )
        rows[contender.name] = {
            "tokens_per_second": round(statistics.median(contender.rates), 1),
            "quartiles": [round(quarters[0], 1), round(quarters[2], 1)],
            "share_of_product_rate": round(
                statistics.median(contender.rates) * shape.flops_per_token / limit, 3
            ),
            "peak_bytes": contender.peak,
        }
    own = {"rankdecay", *GRIDS} if torch.cuda.is_available() else set(GRIDS)
    for name in {name for name, row in rows.items() if "failed" not in row} & own:
        rows[name]["plan"] = planned(shape, name, limit)
    return {
        "shape": {"name": shape_name, **shape.plain(), "parameters": shape.parameters},
        "type": "bf16 with fp32 masters" if half() else "fp32",
        "product_rate_gflops": round(limit / 1e9, 1),
        "contenders": rows,
    }


def planned(shape: Shape, name: str, rate: float) -> dict[str, Any]:
    """What `pretrain plan --gpu here` says of a contender of ours, with this run's product rate."""
    config = parse_config(recipe_values(shape, name == "rankdecay", GRIDS.get(name, {})))
    count = processes_of(name)
    device = measure_here(count, config)
    shared = 1 if torch.cuda.is_available() else count
    choice = choose(
        config, replace(device, tflops=rate / shared / 1e12, tflops32=rate / shared / 1e12), count
    )
    tokens = shape.batch * shape.context
    return {"tokens_per_second": tokens / choice.seconds["step"], "peak_bytes": choice.total,
            "parts": choice.memory, "seconds": choice.seconds}  # fmt: skip


def print_table(result: dict[str, object]) -> None:
    """One table a shape."""
    rows = result["contenders"]
    assert isinstance(rows, dict)
    print(
        f"\n{result['shape']}\n{result['type']}, products {result['product_rate_gflops']} Gflop/s"
    )
    own = rows.get("rankdecay", {}).get("tokens_per_second", 0.0)
    for name, row in rows.items():
        if "failed" in row:
            print(f"{name:15} does not run here: {row['failed']}")
            continue
        print(
            f"{name:15} {row['tokens_per_second']:>10,.0f} tokens/s  "
            f"{row['quartiles'][0]:,.0f}-{row['quartiles'][1]:,.0f}  "
            f"{100 * row['share_of_product_rate']:5.1f} % of products  "
            f"{row['peak_bytes'] / 2**20:7,.0f} MiB  x{own / row['tokens_per_second']:.2f}"
        )
    for name, row in rows.items():
        plan = row.get("plan")
        if plan:
            print(
                f"plan of {name:15} {plan['tokens_per_second']:8,.0f} tokens/s "
                f"({plan['tokens_per_second'] / row['tokens_per_second'] - 1:+.0%}), "
                f"{plan['peak_bytes'] / 2**20:6,.0f} MiB "
                f"({plan['peak_bytes'] / row['peak_bytes'] - 1:+.0%})"
            )


def main() -> None:
    """Measure and print; JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    matches = ON_GPU if torch.cuda.is_available() else MATCHES
    parser.add_argument("--shape", nargs="+", default=list(matches), choices=sorted(SHAPES))
    parser.add_argument("--contender", nargs="+", help="default: those that fit the shape")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, default=0, help="updates of a turn")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    for shape in options.shape:
        names = options.contender or list({**MATCHES, **ON_GPU}[shape])
        results.append(measure(shape, names, options.turns, options.steps or STEPS[shape]))
        print_table(results[-1])
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        figures = {"device": device, "results": results}
        finish(figures, options.out, show=False)  # what there is, should it be stopped


if __name__ == "__main__":
    main()
