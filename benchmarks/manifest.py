"""The manifest of a 70 B checkpoint: its size, and seconds and memory to write and to read it.

    python benchmarks/manifest.py --out results.json

The entries of all processes are simulated (tensor parallelism 8, ZeRO 3 over the others): names,
sizes and hashes, but no tensors. The form before is one entry for each piece of each parameter.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results_file import answer, ask, finish

MODEL = {"dialect": "llama", "num_layers": 80, "hidden_size": 8192, "num_attention_heads": 64,
         "num_key_value_heads": 8, "ffn_hidden_size": 28_672, "context": 4096,
         "vocabulary_size": 32_000}  # fmt: skip
TENSOR = 8
KEYS = ["exp_avg", "exp_avg_sq", "master"]


def measure(processes: int) -> dict[str, Any]:
    """Write and read one manifest."""
    from models.gpt import whole_model
    from pretrain.checkpoint.manifest import MANIFEST, describe, read_manifest, written_manifest
    from pretrain.checkpoint.stored import StoredTensors
    from pretrain.config.recipe import parse_config
    from pretrain.decay.control import DecayControl
    from pretrain.decay.plan import plan_decay

    grid = {"tensor": TENSOR, "pipeline": 1, "data": processes // TENSOR, "zero_stage": 3}
    config = parse_config({"model": MODEL})
    infos = whole_model(config.model, TENSOR)
    plan = plan_decay(infos, config.optimizer.weight_decay)
    state = {"tokenizer": "", "data": "", "decay": DecayControl(config, plan).state()}
    described = describe(config, plan, 1, state, grid)
    for process in range(processes):
        fragments: dict[str, tuple[int, int, list[str]]] = {}
        data = process // TENSOR
        for info in infos:
            if info.partition_dim is None and process % TENSOR:
                continue
            local = info.numel // (TENSOR if info.partition_dim is not None else 1)
            width = -(-local // grid["data"])
            low = min(data * width, local)
            if high := min(width, local - low):
                fragments[info.name] = (low, high, KEYS)
        size = sum(12 * numel for _, numel, _ in fragments.values()) + 100_000
        described["files"][f"rank-{process:05d}.safetensors"] = {
            "size": size, "sha256": f"{process:064x}", "tensor_rank": process % TENSOR,
            "fragments": fragments,
        }  # fmt: skip
    before = len(json.dumps(described))
    began = time.monotonic()
    text = written_manifest(described)
    writing = time.monotonic() - began
    pieces = sum(len(entry["fragments"]) for entry in described["files"].values())
    del described
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / MANIFEST).write_bytes(text)
        held = resident()
        began = time.monotonic()
        _, written = read_manifest(Path(name))
        stored = StoredTensors(Path(name), written["files"])
        reading = time.monotonic() - began
    assert len(stored.places) == len(infos)
    return {
        "pieces": pieces,
        "bytes": len(text),
        "bytes_before": before,
        "seconds_to_write": round(writing, 2),
        "seconds_to_read": round(reading, 2),
        "memory_of_reading_bytes": max(0, resident() - held),
    }


def resident() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def main() -> None:
    """Measure each number of processes in a process of its own, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--processes", type=int, help="measure one number of processes here")
    options = parser.parse_args()
    if options.processes:
        answer(measure(options.processes))
        return
    result: dict[str, Any] = {}
    for processes in (64, 256, 1024):
        result[str(processes)] = ask("--processes", str(processes))
        print(f"{processes} processes: {result[str(processes)]}", file=sys.stderr)
    finish({"processes": result}, options.out)


if __name__ == "__main__":
    main()
