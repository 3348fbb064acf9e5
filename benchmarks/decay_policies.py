"""What each decay policy costs: time of a training step, relative to constant AdamW decay.

    python benchmarks/decay_policies.py DATA [--rounds 12] [--out FILE.json]

DATA is a folder written by `pretrain data tokenize`. All engines live in one process and take turns
(A B C A B C ...); medians over the rounds. Measurements for AlphaDecay and rank targets are not in
a step: they are timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data_pipeline.dataset import TrainingData
from pretrain.config.recipe import parse_config
from pretrain.distributed.grid import build_grid, connect, disconnect
from pretrain.engine.engine import Engine, build_engine
from pretrain.ranks.probe import measure
from pretrain.tasks.text import Text
from pretrain.training.loader import Loader
from pretrain.training.setup import prepare

POLICIES: dict[str, dict[str, Any]] = {
    "constant": {},
    "schedule": {"policies": [{"kind": "schedule", "roles": ["attention", "mlp"]}]},
    "l2": {"form": "l2"},
    "cautious": {"form": "cautious"},
    "adadecay": {"form": "adadecay"},
    "awd": {"policies": [{"kind": "awd"}]},
    "alpha": {"policies": [{"kind": "alpha"}]},
    "rank_target": {"policies": [{"kind": "rank_target", "target": 0.6}]},
    "nuclear": {"form": {"attention": "nuclear"}},
    "nuclear_every_8": {"form": {"attention": "nuclear"}, "nuclear_every": 8},
}


def recipe(data: Path, decay: dict[str, Any]) -> dict[str, Any]:
    """The shape of configs/gpt-tiny.yaml."""
    return {
        "model": {"dialect": "gpt_neox", "num_layers": 4, "hidden_size": 192,
                  "num_attention_heads": 4, "context": 256},
        "data": {"path": str(data)},
        "train": {"steps": 1000, "global_batch": 16},
        "precision": "fp32",
        "optimizer": {"weight_decay": {"default": 0.1, **decay}},
    }  # fmt: skip


def main() -> None:
    """Time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    device = connect()
    engines: dict[str, tuple[Engine, Loader]] = {}
    for name, decay in POLICIES.items():
        config = parse_config(recipe(words.data, decay))
        grid = build_grid(config.grid, device)
        setup = prepare(config, 1)
        assert isinstance(setup.task, Text)
        samples = TrainingData(setup.task.manifest, "proportional", 256, 1, 16_000)
        engine = build_engine(setup.config, grid, setup.plan)
        engines[name] = engine, Loader(samples, grid, 16, 16, 0, 0)
    times: dict[str, list[float]] = {name: [] for name in POLICIES}
    for turn in range(words.rounds + 2):
        for name, (engine, loader) in engines.items():
            began = time.perf_counter()
            engine.begin_step(turn, 1e-4)
            engine.train_step(loader)
            if turn >= 2:
                times[name].append(time.perf_counter() - began)
    engine = engines["alpha"][0]
    apart = {}
    for subject, call in (
        ("exponents", lambda: engine.shrinker.figures(engine.control.wanting("weights")[0])),
        ("ranks", lambda: measure(engine, 0, 0, engine.config.ranks)),
    ):
        began = time.perf_counter()
        call()
        apart[subject] = time.perf_counter() - began
    base = statistics.median(times["constant"])
    policies = {
        name: {
            "seconds": statistics.median(values),
            "ratio": statistics.median(
                mine / base_seconds
                for mine, base_seconds in zip(values, times["constant"], strict=True)
            ),
        }
        for name, values in times.items()
    }
    for name, row in policies.items():
        print(f"{name:16} {row['seconds'] * 1000:8.1f} ms  {row['ratio']:.3f}")
    for subject, seconds in apart.items():
        print(f"measuring {subject}: {seconds * 1000:.0f} ms, {seconds / base:.2f} steps")
    if words.out:
        result = {
            "command": "python " + " ".join(["benchmarks/decay_policies.py", *sys.argv[1:]]),
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "rounds": words.rounds,
            "policies": policies,
            "measurements": apart,
        }
        words.out.write_text(json.dumps(result, indent=1) + "\n")
    disconnect()


if __name__ == "__main__":
    main()
