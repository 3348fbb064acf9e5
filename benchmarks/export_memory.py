"""Memory of an export: a checkpoint of a large model on disk, written as a Hugging Face model.

    python benchmarks/export_memory.py --hidden 2048 --layers 24 --out results.json

The checkpoint holds random masters, a file for each part of the model; the export runs in a process
of its own, whose peak resident memory is compared with that of exporting a tiny model (imports,
interpreter) and with the largest part: a layer, or the embedding.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.results_file import finish
from models.gpt import whole_model
from pretrain.checkpoint.reader import checkpoint_name
from pretrain.config.recipe import parse_config
from pretrain.decay.control import DecayControl
from pretrain.decay.plan import plan_decay
from pretrain.offline.import_model import write_masters


def write_checkpoint(folder: Path, dialect: str, hidden: int, layers: int) -> tuple[int, int]:
    """A checkpoint of random masters; returns (bytes in all, bytes of the largest part)."""
    model = {"dialect": dialect, "num_layers": layers, "hidden_size": hidden, "context": 2048,
             "num_attention_heads": max(1, hidden // 64), "vocabulary_size": 50_304}  # fmt: skip
    config = parse_config({"model": model})
    infos = whole_model(config.model, 1)
    plan = plan_decay(infos, config.optimizer.weight_decay)
    state = {"tokenizer": "", "eod": 0, "data": "", "decay": DecayControl(config, plan).state()}
    files = write_masters(folder, config, plan, state, 1, lambda info: torch.rand(info.shape))
    sizes = {name: entry["size"] for name, entry in files.items()}
    # Embedding and head are parts of their own in an export.
    ends = max(4 * info.numel for info in infos if info.layer is None)
    blocks = [size for name, size in sizes.items() if not name.startswith("ends")]
    return sum(sizes.values()), max(ends, *blocks)


def export(checkpoint: Path, out: Path) -> tuple[int, float]:
    """(peak resident bytes, seconds) of `pretrain export`."""
    script = (
        # VmHWM begins with the program; ru_maxrss would begin with what this process had.
        "from pathlib import Path; from pretrain.__main__ import main\n"
        "try: main()\n"
        "finally:\n"
        "    text = Path('/proc/self/status').read_text()\n"
        "    print('peak', text.split('VmHWM:')[1].split()[0])"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script, "export", str(checkpoint), "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stdout.split("peak ")[1]) * 1024, time.monotonic() - began


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dialect", default="gpt2")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        write_checkpoint(folder / "tiny" / checkpoint_name(1), options.dialect, 64, 1)
        base, _ = export(folder / "tiny" / checkpoint_name(1), folder / "tiny-hf")
        large = folder / "large" / checkpoint_name(1)
        total, largest = write_checkpoint(large, options.dialect, options.hidden, options.layers)
        peak, seconds = export(large, folder / "large-hf")
        shutil.rmtree(folder / "large-hf")
    result = {
        "dialect": options.dialect,
        "checkpoint_bytes": total,
        "largest_part_bytes": largest,
        "peak_bytes": peak,
        "peak_of_a_tiny_export_bytes": base,
        "peak_over_largest_part": round((peak - base) / largest, 3),
        "seconds": round(seconds, 1),
    }
    finish(result, options.out)


if __name__ == "__main__":
    main()
