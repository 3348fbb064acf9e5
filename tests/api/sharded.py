"""Decay and ranks of transformers' models on the processes of a test: ``sharded.py ANSWER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pretrain.api.groups import decay_groups
from pretrain.api.probe import RankProbe
from tests.api.by_slices import RATE, WORDS, build_odd, worst_after_zero_gradients

BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


def shard(model: Any, family: str) -> Any:
    """The model with each block, and then the rest, sharded over all processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.get_submodule(BLOCKS[family]):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def try_one(family: str, way: str, folder: Path) -> dict[str, float]:
    """The deviations of decay and of the rank table."""
    plain = RankProbe(build_odd(family))
    reference = plain.measure(0) if dist.get_rank() == 0 else []
    model = build_odd(family).train()
    model = shard(model, family) if way == "fsdp" else DistributedDataParallel(model)
    groups = decay_groups(model, **WORDS)
    with RankProbe(model, folder / f"{family}-{way}", every=1, steps=1, decay=groups) as probe:
        rows = probe.measure(0)
        optimizer = groups.attach(torch.optim.AdamW(groups, lr=RATE))
        decay = worst_after_zero_gradients(model, optimizer, backward=True)
        probe.step(1, loss=1.0)
    ranks = max(
        (
            abs(mine[name] - wanted[name]) / max(1.0, abs(wanted[name]))
            for mine, wanted in zip(rows, reference, strict=dist.get_rank() == 0)
            for name in wanted
            if isinstance(wanted[name], float) and wanted[name] == wanted[name]
        ),
        default=0.0,
    )
    return {"decay": decay, "ranks": ranks, "rows": len(rows)}


def main() -> None:
    answer = Path(sys.argv[1])
    dist.init_process_group("gloo")
    found = {
        f"{family} {way}": try_one(family, way, answer.parent)
        for family in BLOCKS
        for way in ("ddp", "fsdp")
    }
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    if dist.get_rank() == 0:
        answer.write_text(json.dumps(parts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
