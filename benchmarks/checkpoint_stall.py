"""What a checkpoint costs the training that goes on: written beside it, and while it waits.

    python benchmarks/checkpoint_stall.py --data data/corpus --out results.json

One engine, the same state saved by turns both ways; the update after each save is timed too, and
compared with the usual one. A delay is the time of save and update together, less a usual update.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results_file import finish
from pretrain.checkpoint.saver import Saver
from pretrain.config.recipe import parse_config
from pretrain.config.run import CheckpointConfig
from pretrain.distributed.grid import build_grid, connect, disconnect
from pretrain.engine.engine import Engine, build_engine
from pretrain.training.loader import Loader
from pretrain.training.setup import prepare

TURNS, USUAL = 5, 8


def timed(engine: Engine, loader: Loader, count: int) -> list[float]:
    """Seconds of each of ``count`` updates."""
    seconds = []
    for number in range(count):
        began = time.monotonic()
        engine.begin_step(number, 1e-4)
        engine.train_step(loader)
        seconds.append(time.monotonic() - began)
    return seconds


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a tokenised folder")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = {"dialect": "gpt2", "num_layers": 8, "hidden_size": options.hidden,
             "num_attention_heads": options.hidden // 64, "context": 128}  # fmt: skip
    values = {"model": model, "data": {"path": str(options.data)}, "precision": "fp32",
              "train": {"steps": 1000, "global_batch": 8}}  # fmt: skip
    config = parse_config(values)
    grid = build_grid(config.grid, connect())
    setup = prepare(config, 1)
    engine = build_engine(setup.config, grid, setup.plan)
    loader = Loader(setup.task.training(setup.config), grid, 8, 8, 0, 4)
    timed(engine, loader, 3)
    delays: dict[str, list[float]] = {"waiting": [], "beside": []}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        savers = {
            name: Saver(engine, Path(folder) / name, CheckpointConfig(asynchronous=beside, keep=1))
            for name, beside in (("waiting", False), ("beside", True))
        }
        for name in savers:
            (Path(folder) / name).mkdir()
        usual = []
        for turn in range(TURNS):
            for name, saver in savers.items():
                usual += timed(engine, loader, USUAL)
                began = time.monotonic()
                saver.save(turn + 1, {})
                timed(engine, loader, 1)
                delays[name].append(time.monotonic() - began - statistics.median(usual))
                saver.finish()
    loader.close()
    engine.close()
    disconnect()
    medians = {name: statistics.median(waits) for name, waits in delays.items()}
    result = {
        "parameters": sum(info.numel for info in setup.infos),
        "usual_update_seconds": round(statistics.median(usual), 3),
        "delay_seconds": {
            name: [round(value, 3) for value in waits] for name, waits in delays.items()
        },
        "median_delay_seconds": {name: round(value, 3) for name, value in medians.items()},
        "beside_over_waiting": round(medians["beside"] / medians["waiting"], 3),
    }
    finish(result, options.out)


if __name__ == "__main__":
    main()
