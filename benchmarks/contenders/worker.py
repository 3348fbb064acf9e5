"""One contender in its process: ``worker.py NAME SHAPE``; reads step counts, answers with JSON.

A line with a number asks for so many updates; the answer has their seconds, the last loss and the
peak memory so far. An empty line is the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.contenders import peers
from benchmarks.contenders.common import Step, device, tensors
from benchmarks.contenders.shapes import SHAPES, Shape


def peak_resident() -> int:
    """Bytes, since the program began (ru_maxrss would begin with its parent's)."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def recipe_values(
    shape: Shape, compiled: bool = False, grid: dict[str, int] | None = None
) -> dict[str, Any]:
    """The recipe of a shape."""
    return {
        "model": {"dialect": shape.dialect, "num_layers": shape.layers,
                  "hidden_size": shape.hidden, "num_attention_heads": shape.heads,
                  "num_key_value_heads": shape.key_value_heads,
                  "ffn_hidden_size": shape.inner, "context": shape.context,
                  "vocabulary_size": shape.vocabulary},
        "train": {"steps": 10_000, "global_batch": shape.batch,
                  "micro_batch": 1 if (grid or {}).get("pipeline_parallel") else 0},
        "optimizer": {"learning_rate": shape.rate, "gradient_clipping": shape.clipping,
                      "weight_decay": {"default": shape.decay}},
        "speed": {"compile": compiled},
        "grid": grid or {},
    }  # fmt: skip


def rankdecay(shape: Shape, compiled: bool = True, grid: dict[str, int] | None = None) -> Step:
    """This program, as `pretrain train` runs it with `speed.compile`."""
    return rankdecay_engine(shape, compiled, grid)[1]


def rankdecay_deepspeed(shape: Shape) -> Step:
    """This program as it comes, its updates made by DeepSpeed (`speed.update`)."""
    return rankdecay_engine(shape, compiled=False, update="deepspeed")[1]


def rankdecay_engine(
    shape: Shape,
    compiled: bool = True,
    grid: dict[str, int] | None = None,
    update: str = "auto",
) -> tuple[Any, Step]:
    """Its engine, and what makes an update.

    Args:
        update: `speed.update` of the recipe.
        grid: as in a recipe; pipeline stages work on micro batches of one sequence.
    """
    from models.gpt import whole_model
    from pretrain.config.recipe import parse_config
    from pretrain.decay.plan import plan_decay
    from pretrain.distributed.grid import build_grid, connect
    from pretrain.engine.engine import build_engine, micro_batches
    from pretrain.engine.libraries import load_libraries
    from pretrain.engine.speed import keep_freed_memory

    keep_freed_memory(device())
    values = recipe_values(shape, compiled, grid)
    values["speed"]["update"] = update
    values["speed"] |= json.loads(os.environ.get("SPEED", "{}"))
    config = parse_config(values)
    where = connect()
    load_libraries()
    process_grid = build_grid(config.grid, where)
    plan = plan_decay(whole_model(config.model, process_grid.tensor), config.optimizer.weight_decay)
    engine = build_engine(config, process_grid, plan)
    micro, _ = micro_batches(config, process_grid)
    share = shape.batch // process_grid.data
    first = share * process_grid.data_rank

    def mine() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for inputs, labels in tensors(shape):
            for start in range(first, first + share, micro):
                yield inputs[start : start + micro], labels[start : start + micro]

    data, count = mine(), 0

    def step() -> float:
        nonlocal count
        engine.begin_step(count, shape.rate)
        count += 1
        return engine.train_step(data, more=True)

    return engine, step


GRIDS: dict[str, dict[str, int]] = {
    "rankdecay-eager": {}, "tensor-2": {"tensor_parallel": 2},
    "pipeline-2": {"pipeline_parallel": 2}, "data-2": {},
}  # fmt: skip
"""This program as it comes, without the compiler: on one process, or on two (``-2``)."""
CONTENDERS: dict[str, Callable[[Shape], Step]] = {
    "rankdecay": rankdecay, "rankdecay-deepspeed": rankdecay_deepspeed,
    "plain": peers.plain, "plain-eager": peers.plain_eager, "litgpt": peers.litgpt,
    "trainer": peers.trainer, "trainer-eager": peers.trainer_eager,
    "torchtitan": peers.torchtitan,
    **{name: partial(rankdecay, compiled=False, grid=grid) for name, grid in GRIDS.items()},
}  # fmt: skip


def requests() -> Iterator[int]:
    """Step counts from standard input, told to every process of the contender."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield from (int(line) for line in sys.stdin if line.strip())
        return
    while True:
        turn = [sys.stdin.readline().strip() if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(turn, 0)
        if not turn[0]:
            return
        yield int(turn[0])


def peak_of_all() -> int:
    """Peak memory of the process; of the fullest of several."""
    import torch.distributed as dist

    mine = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return mine
    peaks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, mine)
    return max(peaks)


def main() -> None:
    """Answer until the end."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries may print
    step = CONTENDERS[sys.argv[1]](SHAPES[sys.argv[2]])
    first = os.environ.get("RANK", "0") == "0"
    if first:
        print("ready", file=answers, flush=True)
    for count in requests():
        began, loss = time.monotonic(), float("nan")
        for _ in range(count):
            loss = step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
        answer = {"seconds": seconds, "loss": loss, "peak": peak_of_all()}
        if first:
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
