"""The start of a large model: seconds and memory of one process, without the others.

    python benchmarks/start.py --out results.json

Each case builds the engine of one process of a grid whose other processes are simulated: PyTorch's
``fake`` process group answers every collective at once, without values. The model, the masters and
the working weights of this process are real, and its part of the initial values is drawn.

A process's peak is compared with what it keeps: the sum of its tensors after the start. The kernel
gives memory when it is first written, and DeepSpeed's bucket of gradients is not written during the
start. Its bytes are therefore added to the peak, as a GPU would count them.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import psutil

from benchmarks.results_file import answer, ask, finish
from benchmarks.simulated import join_simulated_grid

ONE_B = {"dialect": "llama", "num_layers": 16, "hidden_size": 2048, "num_attention_heads": 16,
         "context": 2048, "vocabulary_size": 50_304}  # fmt: skip
SEVENTY_B = {"dialect": "llama", "num_layers": 80, "hidden_size": 8192, "num_attention_heads": 64,
             "num_key_value_heads": 8, "ffn_hidden_size": 28_672, "context": 4096,
             "vocabulary_size": 32_000}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], int, dict[str, int]]] = {
    "1 B, ZeRO 1 of 8": (ONE_B, 8, {"zero_stage": 1}),
    "1 B, ZeRO 3 of 8": (ONE_B, 8, {"zero_stage": 3}),
    "70 B, TP 8, ZeRO 3 of 8": (SEVENTY_B, 64, {"tensor_parallel": 8, "zero_stage": 3}),
    "70 B, TP 2, ZeRO 3 of 32": (SEVENTY_B, 64, {"tensor_parallel": 2, "zero_stage": 3}),
}
"""Model, processes, grid."""


def measure(model: dict[str, Any], processes: int, grid: dict[str, int]) -> dict[str, Any]:
    """Build one engine in this process."""
    import torch

    from pretrain.engine.engine import build_engine

    torch.set_num_threads(2)
    recipe = {"model": model, "grid": grid, "precision": "bf16",
              "train": {"global_batch": processes, "steps": 100}}  # fmt: skip
    config, connected, plan = join_simulated_grid(recipe, processes)
    me = psutil.Process()
    gc.collect()
    before = me.memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    began = time.monotonic()
    engine = build_engine(config, connected, plan, draws=False)
    built, building = time.monotonic() - began, peak_now()
    engine.draw()
    seconds = time.monotonic() - began
    drawn = sum(fragment.master.numel() for fragment in engine.fragments())
    peak = peak_now()
    gc.collect()
    kept, unwritten = kept_bytes(engine)
    return {
        "parameters": sum(info.numel for group in plan.groups for info in group.parameters),
        "owned_values": drawn,
        "seconds": round(seconds, 1),
        "seconds_of_drawing": round(seconds - built, 1),
        "peak_bytes": peak - before + unwritten,
        "peak_of_building_bytes": building - before + unwritten,
        "unwritten_bytes": unwritten,
        "kept_bytes": kept,
    }


def peak_now() -> int:
    """Largest resident memory of this process since its peak was reset."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def kept_bytes(engine: Any) -> tuple[int, int]:
    """Bytes of the tensors that the process has after its start, and of those never written."""
    import torch

    storages = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and one.device.type == "cpu":
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    del engine
    missing = sum(missing_bytes(address, size) for address, size in storages.items())
    return sum(storages.values()), missing


def missing_bytes(address: int, size: int) -> int:
    """Bytes of an array whose pages the kernel has not given to this process yet."""
    page = resource.getpagesize()
    first, last = -(-address // page), (address + size) // page
    if last <= first:
        return 0
    with open("/proc/self/pagemap", "rb", buffering=0) as file:  # noqa: PTH123
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * (last - first)), np.uint64)
    return int((entries >> np.uint64(62) == 0).sum()) * page  # neither present nor swapped


def main() -> None:
    """Measure each case in a process of its own, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        answer(measure(*CASES[options.case[0]]))
        sys.stdout.flush()
        os._exit(0)
    result: dict[str, Any] = {}
    for case in options.case or CASES:
        figures = ask("--here", "--case", case)
        figures["peak_over_kept"] = round(figures["peak_bytes"] / figures["kept_bytes"], 3)
        result[case] = figures
        print(f"{case}: {figures}", file=sys.stderr)
    finish({"cases": result}, options.out)


if __name__ == "__main__":
    main()
