"""One measurement of the ranks in a training engine: ``probe_worker.py SHAPE``; prints JSON.

Under torchrun the weights are spread over the processes by ZeRO-1, and every byte that the
measurement sends is counted.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from benchmarks.contenders.shapes import SHAPES
from benchmarks.contenders.worker import rankdecay_engine
from models.gpt import attention_layers
from models.roles import info_of
from pretrain.config.run import RanksConfig
from pretrain.ranks.probe import measure


def main() -> None:
    """Updates and measurements by turns, and the bytes of a measurement."""
    shape = SHAPES[sys.argv[1]]
    engine, step = rankdecay_engine(shape, compiled=False)
    config = RanksConfig()
    step()
    measure(engine, 1, 0, config)
    updates, measurements = [], []
    for _ in range(3):
        began = time.monotonic()
        step()
        updates.append(time.monotonic() - began)
        began = time.monotonic()
        measure(engine, 1, 0, config)
        measurements.append(time.monotonic() - began)
    sent, rows = _counted(engine, config)
    weights = sum(
        4 * info_of(getattr(layer, name)).numel
        for layer in attention_layers(engine.module)
        for name in ("query", "key", "value", "output")
    )
    everything = sum(4 * info_of(parameter).numel for parameter in engine.module.parameters())
    if dist.get_rank() == 0:
        ranks = dist.get_world_size()
        print(
            json.dumps(
                {
                    "processes": ranks,
                    "update_seconds": updates,
                    "measurement_seconds": measurements,
                    "bytes_sent_of_factors": sent,
                    "bytes_sent_of_results": rows,
                    "gather_of_attention": weights * (ranks - 1) / ranks,
                    "gather_of_weights": everything * (ranks - 1) / ranks,
                }
            ),
            file=sys.__stdout__,
            flush=True,
        )


def _counted(engine: Any, config: RanksConfig) -> tuple[int, int]:
    """Bytes that all ranks send in a measurement: parts of factors, and rows of results."""
    sent = 0
    make = dist.P2POp

    def counting(operation: Any, tensor: torch.Tensor, *more: Any, **named: Any) -> Any:
        nonlocal sent
        if operation is dist.isend:
            sent += tensor.numel() * tensor.element_size()
        return make(operation, tensor, *more, **named)

    dist.P2POp = counting  # type: ignore[misc,assignment]
    rows = measure(engine, 1, 0, config)
    dist.P2POp = make  # type: ignore[misc]
    total = torch.tensor([sent])
    dist.all_reduce(total)
    ranks = dist.get_world_size()
    return int(total), len(pickle.dumps(rows)) * (ranks - 1)


if __name__ == "__main__":
    sys.stdout = sys.stderr  # libraries may print
    main()
