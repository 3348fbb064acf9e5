"""Where an update goes: PyTorch's profiler over some updates, operators summed by kind.

python benchmarks/profile_update.py --shape 17m --out benchmarks/results/profile-cpu.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders.shapes import SHAPES
from benchmarks.contenders.worker import CONTENDERS
from benchmarks.results_file import finish

KINDS = {
    "products of layers": ("aten::mm", "aten::addmm"),
    "products of attention": ("aten::bmm", "aten::baddbmm"),
    "SDPA": ("aten::_scaled_dot_product",),
    "copies": ("aten::copy_", "aten::cat", "aten::clone"),
    "GELU": ("aten::gelu",),
    "softmax": ("aten::_softmax",),
    "norms": ("aten::native_layer_norm", "aten::_fused_rms_norm"),
    "compiled": ("## Call CompiledFxGraph", "graph_"),
    "AdamW": ("aten::_fused_adamw", "Optimizer.step"),
}


def main() -> None:
    """Profile and print; JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="17m", choices=sorted(SHAPES))
    parser.add_argument("--contender", default="rankdecay-eager", choices=sorted(CONTENDERS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    step = CONTENDERS[options.contender](SHAPES[options.shape])
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(options.steps):
            step()
    times = dict.fromkeys([*KINDS, "rest"], 0.0)
    for event in profiler.key_averages():
        kind = next((k for k, starts in KINDS.items() if event.key.startswith(starts)), "rest")
        times[kind] += event.self_cpu_time_total
    total = sum(times.values())
    shares = {kind: round(time / total, 4) for kind, time in times.items()}
    for kind, share in sorted(shares.items(), key=lambda pair: -pair[1]):
        print(f"{kind:22} {100 * share:5.1f} %")
    figures = {"contender": options.contender, "shape": options.shape, "shares": shares,
               "milliseconds": total / 1e3 / options.steps}  # fmt: skip
    finish(figures, options.out, show=False)


if __name__ == "__main__":
    main()
