"""Open files of `MainProcess` on many processes: ``descriptors.py REQUEST``, as `run_workers`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from pretrain.distributed.grid import connect, disconnect
from pretrain.distributed.main_process import MainProcess


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def main() -> None:
    """Exchange some values, and write what each process got and how many files it opened."""
    request = json.loads(Path(sys.argv[1]).read_text())
    connect()
    rank, size = dist.get_rank(), dist.get_world_size()
    before, variables = open_files(), dict(os.environ)
    grid: Any = SimpleNamespace(rank=rank, world_size=size, is_main=rank == 0)
    exchange = MainProcess(grid)
    assert dict(os.environ) == variables
    made = open_files()
    got = [exchange.gather((rank, "x" * 1000 * turn)) for turn in range(3)]
    told = [exchange.tell(("from", rank, turn)) for turn in range(3)]
    mine = {"got": got, "told": told, "opened": open_files() - before, "later": open_files() - made}
    answers = exchange.gather(mine)
    if rank == 0:
        Path(request["answer"]).write_text(json.dumps(answers))
    exchange.tell(None)
    disconnect()


if __name__ == "__main__":
    main()
