"""`pretrain ranks` of a LLaMA-2-7B-shaped model on disk: time and peak memory.

    python benchmarks/pretrained_ranks.py --folder llama-7b --out results.json

Writes random bf16 weights of the full model in shards (13.5 GB) unless the folder is there, runs
the command in a process of its own, and reads that process's peak resident memory from the kernel.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results_file import finish

LAYERS, WIDTH, INNER, HEADS, VOCABULARY = 32, 4096, 11008, 32, 32000


def write_model(folder: Path) -> None:
    """Random weights under the names of Hugging Face's Llama, four layers a shard."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}

    def draw(rows: int, columns: int) -> torch.Tensor:
        part = torch.randn(rows, columns, generator=generator) * 0.02
        return part.bfloat16()

    for start in range(0, LAYERS, 4):
        tensors = {}
        for layer in range(start, start + 4):
            name = f"model.layers.{layer}"
            for part in "qkvo":
                tensors[f"{name}.self_attn.{part}_proj.weight"] = draw(WIDTH, WIDTH)
            for part in ("gate", "up"):
                tensors[f"{name}.mlp.{part}_proj.weight"] = draw(INNER, WIDTH)
            tensors[f"{name}.mlp.down_proj.weight"] = draw(WIDTH, INNER)
        if start == 0:
            tensors["model.embed_tokens.weight"] = draw(VOCABULARY, WIDTH)
            tensors["lm_head.weight"] = draw(VOCABULARY, WIDTH)
        file = f"model-{start // 4 + 1:05d}-of-{LAYERS // 4:05d}.safetensors"
        save_file(tensors, folder / file)
        where |= dict.fromkeys(tensors, file)
        print(f"written: {file}", flush=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "intermediate_size": INNER,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config))


def high_water(process: int) -> int:
    """Peak resident memory of a process so far, KiB; `getrusage` would count its parent's too."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    values = [line.split()[1] for line in text.splitlines() if line.startswith("VmHWM")]
    return int(values[0]) if values else 0


def main() -> None:
    """Measure once and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not (options.folder / "config.json").exists():
        write_model(options.folder)
    size = sum(file.stat().st_size for file in options.folder.glob("*.safetensors"))
    words = [sys.executable, "-m", "pretrain", "ranks", str(options.folder)]
    began = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, high_water(process.pid))
        time.sleep(0.05)
    result = {
        "exit_code": process.returncode,
        "seconds": round(time.monotonic() - began, 1),
        "peak_resident_gb": round(peak * 1024 / 1e9, 2),
        "model_gb": round(size / 1e9, 2),
        "heads": 2 * LAYERS * HEADS,
    }
    finish(result, options.out)


if __name__ == "__main__":
    main()
