"""What one waits for: help, the first update, an evaluation.

    python benchmarks/latency.py --out benchmarks/results/latency-cpu.json

The command line in processes of its own, as a user starts it; the first update of
`configs/gpt-tiny.yaml` is timed from the command to its line in the metrics.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results_file import finish

PRETRAIN = [sys.executable, "-m", "pretrain"]


def seconds_of(*words: str) -> float:
    """Of a command that must succeed."""
    began = time.monotonic()
    subprocess.run([*PRETRAIN, *words], cwd=ROOT, check=True, capture_output=True)
    return time.monotonic() - began


def first_update(folder: Path, number: int) -> float:
    """Seconds from the command to the first line of training."""
    run = folder / f"run-{number}"
    words = [
        *PRETRAIN, "train", "configs/gpt-tiny.yaml", "--out", str(run), "train.steps=4",
        f"data.path={folder / 'tokens'}", "logging.every=1", "evaluation.at_end=sample",
    ]  # fmt: skip
    began = time.monotonic()
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    first_seen = 0.0
    while process.poll() is None:
        metrics = run / "metrics.jsonl"
        if not first_seen and metrics.exists() and '"train"' in metrics.read_text(encoding="utf-8"):
            first_seen = time.monotonic() - began
        time.sleep(0.02)
    if process.returncode or not first_seen:
        raise SystemExit(f"no update: {' '.join(words)}")
    return first_seen


def evaluation(folder: Path) -> dict[str, float]:
    """Tokens a second of `pretrain evaluate`, its start included and not."""
    run = str(folder / "run-0")
    short = seconds_of("evaluate", run, "--split", "train", "--documents", "1")
    began = time.monotonic()
    done = subprocess.run(
        [*PRETRAIN, "evaluate", run, "--split", "train", "--documents", "400", "--json"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    whole = time.monotonic() - began
    tokens = json.loads(done.stdout)["overall"]["tokens"]
    return {"tokens": tokens, "seconds": whole, "start_seconds": short,
            "tokens_per_second": tokens / (whole - short)}  # fmt: skip


def main() -> None:
    """Measure and print; JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds_of("data", "corpus", "--out", str(folder / "text"))
        model = str(folder / "pieces.model")
        seconds_of(
            "data", "tokenizer", str(folder / "text"), "--vocab-size", "4096", "--out", model
        )
        tokens = str(folder / "tokens")
        seconds_of("data", "tokenize", str(folder / "text"), "--tokenizer", model, "--out", tokens)
        figures: dict[str, Any] = {
            "help_seconds": [seconds_of("--help") for _ in range(options.turns)],
            "first_update_seconds": [first_update(folder, n) for n in range(options.turns)],
            "evaluation": evaluation(folder),
        }
    for name in ("help_seconds", "first_update_seconds"):
        values = figures[name]
        print(f"{name:21} {statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})")
    print(f"evaluation            {figures['evaluation']['tokens_per_second']:,.0f} tokens/s")
    finish(figures, options.out, show=False)


if __name__ == "__main__":
    main()
