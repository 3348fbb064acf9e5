"""Attention by batched products beside PyTorch's SDPA, forward and backward, by context.

    python benchmarks/attention.py --out benchmarks/results/attention-cpu.json

Decides which kernel `speed.attention: auto` takes (`pretrain/engine/speed.py`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from benchmarks.results_file import finish
from models.products import attention_by_products
from pretrain.engine.speed import keep_freed_memory

SHAPES = [(8, 6, 256, 64), (4, 6, 512, 64), (2, 6, 1024, 64), (1, 6, 2048, 64)]
"""batch, heads, context, head: the 17 M model's, the same tokens each time"""


def main() -> None:
    """Measure by turns and print; JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory(device)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for batch, heads, context, head in SHAPES:
            inputs = [torch.randn(context, batch, heads, head, device=device, dtype=dtype)
                    .permute(1, 2, 0, 3).requires_grad_() for _ in range(3)]  # fmt: skip
            upstream = torch.randn_like(inputs[0])
            q, k, v = inputs
            kernels: dict[str, Callable[[], torch.Tensor]] = {
                "sdpa": partial(F.scaled_dot_product_attention, q, k, v, is_causal=True),
                "products": partial(attention_by_products, q, k, v, True),
            }
            seconds: dict[str, list[float]] = {name: [] for name in kernels}
            for turn in range(options.turns + 1):
                for name, kernel in kernels.items():
                    began = time.perf_counter()
                    torch.autograd.grad(kernel(), inputs, upstream)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    if turn:
                        seconds[name].append(time.perf_counter() - began)
            middle = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
            kind = str(dtype).removeprefix("torch.")
            print(f"{kind:9} context {context:5}: SDPA {middle['sdpa']:6.1f} ms, "
                  f"products {middle['products']:6.1f} ms, "
                  f"x{middle['sdpa'] / middle['products']:.2f}")  # fmt: skip
            rows.append({"type": kind, "context": context, "milliseconds": middle})
    finish({"rows": rows}, options.out, show=False)


if __name__ == "__main__":
    main()
