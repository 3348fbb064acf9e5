"""How long training waits for a measurement of ranks: updates with one after each, and without.

    python benchmarks/statistics_wait.py --shape gpu-125m --compiled --out FILE

On a GPU the factors are copied beside the first pass of the next update, and the CPU computes the
rows during the update after that (`pretrain.ranks.later`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.contenders.shapes import SHAPES
from benchmarks.contenders.worker import rankdecay_engine
from benchmarks.results_file import finish
from pretrain.config.run import RanksConfig
from pretrain.ranks.later import LateRanks
from pretrain.ranks.probe import measure

_WARM, _TURNS, _UPDATES = 6, 8, 3


def milliseconds(work: Callable[[], object]) -> float:
    """The time of a call that waits for the device."""
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def waits(shape_name: str, compiled: bool) -> dict[str, Any]:
    """Medians over turns: some updates, the same with a measurement, and what the latter adds."""
    engine, step = rankdecay_engine(SHAPES[shape_name], compiled)
    late, config = LateRanks(engine), RanksConfig()
    for _ in range(_WARM):
        step()

    def plain() -> None:
        for _ in range(_UPDATES):
            step()

    def measured() -> None:
        """As in training: the rows are written two updates later where that is possible."""
        if late.can_begin():
            late.begin(0, 0, config)
        else:
            measure(engine, 0, 0, config)
        for number in range(1, _UPDATES + 1):
            step()
            late.go_on(number)

    measured()
    alone, together = [], []
    for _ in range(_TURNS):
        alone.append(milliseconds(plain))
        together.append(milliseconds(measured))
    without, with_one = statistics.median(alone), statistics.median(together)
    return {
        "shape": shape_name,
        "compiled": compiled,
        "finished_later": late.can_begin(),
        "update_ms": round(without / _UPDATES, 2),
        "updates": _UPDATES,
        "updates_with_measurement_ms": round(with_one, 2),
        "training_waits_ms": round(with_one - without, 2),
        "quartiles_with": [round(q, 2) for q in statistics.quantiles(together, n=4)],
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure one shape and print; JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = "gpu-125m" if torch.cuda.is_available() else "17m"
    parser.add_argument("--shape", default=default, choices=sorted(SHAPES))
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    finish({"device": device, **waits(options.shape, options.compiled)}, options.out)


if __name__ == "__main__":
    main()
