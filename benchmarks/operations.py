"""Operations that one update dispatches, beside those of a plain loop: counts, not times.

    python benchmarks/operations.py --out benchmarks/results/operations-cpu.json

A GPT-2 of 12 layers makes some updates with AdamW and clipping. All ATen operations of the last are
counted, views too: they are what the host of a GPU must start. A custom operator counts as one. Of
compiled code, PyTorch's profiler counts the compiler's kernels and the innermost operations that
compute or copy; a ``_foreach`` operation counts as one, as on a GPU.

"As on a GPU" uses the kernels that `speed` chooses for a GPU, and leaves out what only a CPU needs:
LayerNorm's gradients in blocks of rows. The logits of the loss are one block. The other processes
of a grid are simulated by PyTorch's ``fake`` process group.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch._inductor.config as inductor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contenders import peers
from benchmarks.contenders.common import Step
from benchmarks.contenders.shapes import Shape
from benchmarks.results_file import answer, ask, finish
from benchmarks.simulated import join_simulated_grid
from models.kernels import Kernels

SHAPE = Shape(layers=12, hidden=64, heads=4, context=32, batch=8, vocabulary=512)
CASES: dict[str, tuple[str, int, dict[str, int]]] = {
    "plain loop": ("plain", 1, {}),
    "rankdecay": ("cpu", 1, {"zero_stage": 1}),
    "rankdecay, as on a GPU": ("gpu", 1, {"zero_stage": 1}),
    "rankdecay, as on a GPU, data 2": ("gpu", 2, {"zero_stage": 1}),
    "rankdecay, as on a GPU, tensor 2": ("gpu", 2, {"zero_stage": 1, "tensor_parallel": 2}),
    "plain loop, compiled": ("plain", 1, {}),
    "rankdecay, as on a GPU, compiled": ("gpu", 1, {"zero_stage": 1}),
}
"""What makes the update, processes, grid."""
COMPILED = ", compiled"


class Operations(TorchDispatchMode):
    """While it is on, counts the ATen operations that this process dispatches, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count(case: str, precision: str) -> dict[str, int]:
    """Operations of an update, by name, in this process."""
    kind, processes, grid = CASES[case]
    compiled = case.endswith(COMPILED)
    inductor.cpp.enable_kernel_profile = True
    with _as_on(kind, precision, compiled):
        if kind == "plain":
            step = peers.plain(SHAPE, compiled)
        else:
            step = _rankdecay(precision, processes, grid)
        for _ in range(3):
            step()
        if compiled:
            return _profiled(step)
        with Operations() as operations:
            step()
    return dict(operations.counts)


def _profiled(step: Step) -> dict[str, int]:
    """Kernels of the compiler, and operations that have no others inside them, without views.

    Attention counts as one operation, whatever its kernel for a CPU consists of.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    counts: Counter[str] = Counter()
    for event in profile.events():
        if "_fused_" in event.name and not event.name.startswith("aten::"):
            counts["compiled kernel"] += 1
        elif _computes(event) and not _is_inside_one(event) and _is_innermost(event):
            counts[event.name] += 1
    return dict(counts)


_VIEWS = frozenset((
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach",
    "detach_", "empty", "empty_like", "empty_strided", "expand", "flatten", "is_nonzero", "item",
    "lift_fresh", "narrow", "new_empty_strided", "permute", "reshape", "resize_", "resolve_conj",
    "resolve_neg", "result_type", "select", "set_", "slice", "split", "split_with_sizes", "squeeze",
    "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view", "zeros", "zeros_like",
))  # fmt: skip
"""Operations that start nothing on a device, or only others."""


def _is_one(event: Any) -> bool:
    """Whether it counts as one operation, because its parts are those of a CPU's kernel."""
    return "_foreach_" in event.name or "_dot_product_flash_attention" in event.name


def _is_inside_one(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and (_is_one(parent) or _is_inside_one(parent))


def _is_innermost(event: Any) -> bool:
    return _is_one(event) or not any(map(_computes, event.cpu_children))


def _computes(event: Any) -> bool:
    space, _, name = event.name.partition("::")
    return space == "aten" and name not in _VIEWS


@contextlib.contextmanager
def _as_on(kind: str, precision: str, compiled: bool) -> Iterator[None]:
    if kind != "gpu":
        # The plain loop's choice would depend on whether this machine multiplies bf16 fast.
        with patch("benchmarks.contenders.peers.half", lambda: precision == "bf16"):
            yield
        return
    from pretrain.engine.speed import choose_kernels

    def chosen(*given: Any) -> Kernels:
        on_cpu = choose_kernels(*given)
        return replace(on_cpu, joined=True, selective=False, attention="sdpa", compiled=compiled)

    with (
        patch("models.wide_sums._sums_narrowly", lambda _: False),
        patch("pretrain.engine.building.choose_kernels", chosen),
    ):
        yield


def _rankdecay(precision: str, processes: int, grid: dict[str, int]) -> Step:
    from benchmarks.contenders.common import tensors
    from benchmarks.contenders.worker import recipe_values
    from pretrain.engine.engine import build_engine

    values = recipe_values(SHAPE, grid=grid) | {"precision": precision}
    # As many sequences on this process as in the plain loop.
    values["train"]["global_batch"] = SHAPE.batch * processes // grid.get("tensor_parallel", 1)
    config, connected, plan = join_simulated_grid(values, processes)
    engine, data = build_engine(config, connected, plan), tensors(SHAPE)
    steps = iter(range(10_000))

    def step() -> float:
        engine.begin_step(next(steps), SHAPE.rate)
        return engine.train_step(data)

    return step


def main() -> None:
    """Count each case in a process of its own, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        answer(count(*options.here))
        return
    table: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        for case in CASES:
            counts = ask("--here", case, precision)
            total = sum(counts.values())
            loop = "plain loop" + (COMPILED if case.endswith(COMPILED) else "")
            plain = table.get(loop, {}).get(precision, {}).get("operations", total)
            table.setdefault(case, {})[precision] = {
                "operations": total, "by_plain_loop": round(total / plain, 3),
                "most": dict(Counter(counts).most_common(12)),
            }  # fmt: skip
            print(f"{case}, {precision}: {total} ({total / plain:.2f})", file=sys.stderr)
    finish({"shape": SHAPE.plain(), "cases": table}, options.out)


if __name__ == "__main__":
    main()
