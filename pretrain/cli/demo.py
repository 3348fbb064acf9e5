"""`pretrain demo`: runs the whole pipeline at a small size, on text that this machine has."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from data_pipeline.files import locked
from data_pipeline.prepare import prepare_embedded
from pretrain.config.recipe import Config, apply_overrides, parse_config
from pretrain.distributed.grid import build_grid, connect, disconnect
from pretrain.errors import RunError
from pretrain.report import print_summary, write_report
from pretrain.training.start import train

DECAYS = (0.0, 1.0, 3.0, 10.0)
"""Exposures Σηλ near 0, 0.6, 2 and 6 over the demo's run: the paper's λ = 0.1 has about 3."""


def demo_config(data: Path, steps: int) -> Config:
    """The recipe that all arms of the demo share."""
    return parse_config(
        {
            "seed": 1,
            "model": {
                "dialect": "gpt2",
                "num_layers": 3,
                "hidden_size": 128,
                "num_attention_heads": 2,
                "context": 128,
            },
            "data": {"path": str(data)},
            "precision": "fp32",  # the same figures on every machine
            "train": {"steps": steps, "global_batch": 16},
            "optimizer": {
                "learning_rate": 4e-3,
                "schedule": {"warmup": 0.05},
                "weight_decay": {"default": 0.1, "attention": 0.0},
            },
            "ranks": {"every": max(1, steps // 15)},
            "evaluation": {"every": max(1, steps // 5), "documents": 40, "batch": 16},
            "checkpoint": {"every": max(1, steps // 2), "keep": 1},
        },
        "demo",
    )


def run_demo(out: Path, steps: int) -> None:
    """Make corpus, tokenizer and tokens, one run per decay, and a report."""
    with locked(out):
        _run(out, steps)


def _run(out: Path, steps: int) -> None:
    began = time.monotonic()
    data = prepare_embedded(out, _say)
    base = demo_config(data, steps)
    device = connect()
    runs = []
    for decay in DECAYS:
        run = out / "runs" / f"decay-{decay:g}"
        _say(f"train with attention decay {decay:g}")
        config = apply_overrides(base, [f"optimizer.weight_decay.attention={decay}"])
        train(config, run, build_grid(config.grid, device))
        runs.append(run)
    study = write_report(runs, out / "report.html")
    disconnect()
    print_summary(study)
    print(f"report: {(out / 'report.html').resolve()}  ({time.monotonic() - began:.0f} s)")
    least, most = (study.conditions[index].runs[0] for index in (0, -1))
    if most.mean("qk", "pseudo_rank") >= least.mean("qk", "pseudo_rank"):
        raise RunError(
            f"{out}: the rank of W_QK did not fall with decay, but this demo expects it to; please "
            "report this"
        )


def _say(text: str) -> None:
    print(f"demo: {text}", file=sys.stderr, flush=True)
